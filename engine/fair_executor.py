"""A thread for work of several tenants."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

from lattice_serve.engine.shares import Shares

R = TypeVar("R")


class FairExecutor(Generic[R]):
    """Runs one function after another, in a thread of its own.

    The next one is of the tenant that has had the least time for its weight (start-time fair queueing), its oldest.
    """

    def __init__(self, name: str, shares: Shares, nice: int = 0) -> None:
        """nice: how much the thread yields to others, as `nice` says it."""
        self._shares = shares
        self._pool = ThreadPoolExecutor(1, name, _yield_to_others, (nice,))
        self._lock = threading.Lock()
        self._queues: dict[str, deque[tuple[Future[R], Callable[[], R]]]] = {}
        """Of the tenants that have any work, and none of it empty."""
        self._service: dict[str, float] = {}
        """Seconds that each tenant has had, by its weight."""
        self._begun = 0.0
        """The service of the tenant that was chosen last, then: who comes anew begins there, without a claim."""

    def submit(self, tenant: str, function: Callable[[], R]) -> Future[R]:
        future: Future[R] = Future()
        with self._lock:
            if tenant not in self._queues:
                self._queues[tenant] = deque()
                self._service[tenant] = max(self._service.get(tenant, 0.0), self._begun)
            self._queues[tenant].append((future, function))
        self._pool.submit(self._run_next)
        return future

    def _run_next(self) -> None:
        with self._lock:
            tenant = min(self._queues, key=self._service.__getitem__)
            queue = self._queues[tenant]
            future, function = queue.popleft()
            if not queue:
                del self._queues[tenant]
            self._begun = self._service[tenant]
        if not future.set_running_or_notify_cancel():
            return
        began = time.monotonic()
        try:
            result = function()
        except Exception as error:
            self._charge(tenant, began)
            future.set_exception(error)
        else:
            self._charge(tenant, began)
            future.set_result(result)

    def _charge(self, tenant: str, began: float) -> None:
        with self._lock:
            self._service[tenant] += (time.monotonic() - began) / self._shares.weight(tenant)


def _yield_to_others(nice: int) -> None:
    thread = threading.get_native_id()  # which is all that is meant: on Linux threads have priorities of their own
    os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + nice)
