"""A thread for work of several tenants."""

from __future__ import annotations

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

    def __init__(self, name: str, shares: Shares, busy: float = 1.0) -> None:
        """busy: the part of a processor's time that the thread may take; it sleeps for the rest.

        A lower priority of the thread would do for that, too, but that it may be holding Python's lock meanwhile.
        """
        self._rest = 1 / busy - 1
        self._shares = shares
        self._pool = ThreadPoolExecutor(1, name)
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
        began, busy = time.monotonic(), time.thread_time()
        try:
            result = function()
        except Exception as error:
            self._charge(tenant, began)
            future.set_exception(error)
        else:
            self._charge(tenant, began)
            future.set_result(result)
        if self._rest:
            time.sleep(self._rest * (time.thread_time() - busy))

    def _charge(self, tenant: str, began: float) -> None:
        with self._lock:
            self._service[tenant] += (time.monotonic() - began) / self._shares.weight(tenant)
