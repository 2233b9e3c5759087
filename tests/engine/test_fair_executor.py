"""One thread for the work of several tenants: who goes next, and what comes back."""

from __future__ import annotations

import threading
import time

import pytest

from lattice_serve.engine import fair_executor
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


class Clock:
    """Time that goes by where a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    thread_time = monotonic


def test_tenants_take_turns_by_time_and_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(fair_executor, "time", clock)
    shares = Shares()
    shares.weigh("heavy", 3)
    executor: FairExecutor[None] = FairExecutor("test", shares)
    begin, order = threading.Event(), list[str]()
    executor.submit("first", lambda: (begin.wait(5), None)[1])
    futures = []
    for tenant, seconds, count in [("greedy", 2.0, 8), ("polite", 2.0, 2), ("heavy", 2.0, 6)]:
        for _ in range(count):

            def work(tenant: str = tenant, seconds: float = seconds) -> None:
                order.append(tenant)
                clock.now += seconds

            futures.append(executor.submit(tenant, work))
    begin.set()
    for future in futures:
        future.result(5)
    assert order[:3] == ["greedy", "polite", "heavy"], "nobody has had anything"
    assert order[3:5] == ["heavy", "heavy"], "it is served three times as much"
    assert order[:10].count("greedy") == order[:10].count("polite") == 2
    assert order[10:].count("greedy") == 6


def test_what_is_cancelled_is_not_run() -> None:
    executor: FairExecutor[None] = FairExecutor("test", Shares())
    begin, ran = threading.Event(), list[int]()
    executor.submit("a", lambda: (begin.wait(5), None)[1])
    futures = [executor.submit("a", lambda i=i: ran.append(i)) for i in range(3)]  # type: ignore[misc]
    assert futures[1].cancel()
    begin.set()
    futures[2].result(5)
    assert ran == [0, 2]


def test_it_takes_a_part_of_a_processor() -> None:
    executor: FairExecutor[None] = FairExecutor("test", Shares(), busy=0.25)

    def work() -> None:
        until = time.thread_time() + 0.02
        while time.thread_time() < until:
            pass

    began = time.monotonic()
    for future in [executor.submit("a", work) for _ in range(4)]:
        future.result(20)
    assert time.monotonic() - began >= 3 * 0.02 / 0.25 + 0.02
