"""One thread for the work of several tenants: who goes next, and what comes back."""

from __future__ import annotations

import threading
import time

import pytest

from lattice_serve.engine.fair_executor import FairExecutor
from lattice_serve.engine.shares import Shares


def test_results_and_errors_come_back() -> None:
    executor: FairExecutor[int] = FairExecutor("test", Shares())

    def fails() -> int:
        raise ValueError("no")

    assert executor.submit("a", lambda: 3).result(5) == 3
    with pytest.raises(ValueError, match="no"):
        executor.submit("a", fails).result(5)
    assert executor.submit("a", lambda: 4).result(5) == 4, "it goes on"


def test_tenants_take_turns_by_time_and_weight() -> None:
    shares = Shares()
    shares.weigh("heavy", 3)
    executor: FairExecutor[None] = FairExecutor("test", shares)
    begin, order = threading.Event(), list[str]()
    executor.submit("first", lambda: (begin.wait(5), None)[1])
    futures = []
    for tenant, seconds, count in [("greedy", 0.02, 8), ("polite", 0.02, 2), ("heavy", 0.02, 6)]:
        for _ in range(count):

            def work(tenant: str = tenant, seconds: float = seconds) -> None:
                order.append(tenant)
                time.sleep(seconds)

            futures.append(executor.submit(tenant, work))
    begin.set()
    for future in futures:
        future.result(5)
    assert order[:3] == ["greedy", "polite", "heavy"], "nobody has had anything"
    assert "greedy" not in order[3:5], "heavy is served three times as much"
    assert sorted(order[:8])[:2] == ["greedy", "greedy"]
    assert order[8:].count("greedy") == 6


def test_what_is_cancelled_is_not_run() -> None:
    executor: FairExecutor[None] = FairExecutor("test", Shares())
    begin, ran = threading.Event(), list[int]()
    executor.submit("a", lambda: (begin.wait(5), None)[1])
    futures = [executor.submit("a", lambda i=i: ran.append(i)) for i in range(3)]  # type: ignore[misc]
    assert futures[1].cancel()
    begin.set()
    futures[2].result(5)
    assert ran == [0, 2]
