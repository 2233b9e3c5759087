"""The engines of a server, and which of them works on what."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Literal, TypeAlias

import structlog

from lattice_serve.engine.config import EngineConfig
from lattice_serve.engine.errors import EngineUnavailable, LatticeError
from lattice_serve.engine.messages import Ready, Submit
from lattice_serve.engine.shares import salted
from lattice_serve.server.engine_client import EngineClient
from lattice_serve.server.feed import Feed
from lattice_serve.server.metrics import Metrics
from lattice_serve.server.seen import Seen, beginnings
from lattice_serve.server.supervisor import Supervisor

_SLACK = 8
"""An engine may have so much more to do than another, a part of its rows, for the sake of what it has read."""

_WINDOW = 2
"""Of the sequences of one request, so many a row may run or wait at once."""

ReplicaState: TypeAlias = Literal["starting", "ready", "restarting"]


class Replica:
    """One engine: the way to it, and what keeps it running."""

    def __init__(
        self,
        config: EngineConfig,
        metrics: Metrics,
        command: Sequence[str],
        watchdog_seconds: float,
        cache_options: Sequence[str] = (),
    ) -> None:
        self.client = EngineClient(metrics, watchdog_seconds)
        self.supervisor = Supervisor(config, self.client, command, cache_options)

    @property
    def state(self) -> ReplicaState:
        if self.client.ready is not None:
            return "ready"
        return "restarting" if self.client.ever_ready else "starting"


class Router:
    """`async with` it to have all engines run. Each dies and comes back alone; the others go on."""

    def __init__(self, replicas: Sequence[Replica], *, max_waiting: int) -> None:
        self.replicas = replicas
        self._max_waiting = max_waiting
        self._feeds: set[Feed] = set()
        """Those that have more to submit, or had."""
        self._seen: Seen[EngineClient] = Seen()
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Router:
        self._tasks = [asyncio.create_task(_run(number, replica)) for number, replica in enumerate(self.replicas)]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        for result in await asyncio.gather(*self._tasks, return_exceptions=True):
            if isinstance(result, Exception):
                raise result

    @property
    def ready(self) -> list[Ready]:
        """What the engines that take requests said of themselves."""
        return [replica.client.ready for replica in self.replicas if replica.client.ready is not None]

    @property
    def live(self) -> int:
        """Sequences submitted and not ended."""
        return sum(replica.client.live for replica in self.replicas)

    @property
    def tenants(self) -> Counter[str]:
        """Places of sequences that are not free, of each tenant that has any: those of its live sequences, and of those
        that follow them."""
        taken = sum((replica.client.tenants for replica in self.replicas), Counter[str]())
        for feed in self._feeds:
            if feed.unused:
                taken[feed.tenant] += feed.unused
        return taken

    @property
    def capacity(self) -> int:
        """Sequences that the engines which take requests can run or let wait."""
        return sum(self._capacity(replica.client) for replica in self.replicas)

    @property
    def window(self) -> int:
        """Sequences of one request that may run or wait at once: enough to keep all rows at work, and no more, for
        others are to be let in beside a long list."""
        return max(1, min(self.capacity, _WINDOW * sum(ready.rows for ready in self.ready)))

    def _capacity(self, client: EngineClient) -> int:
        return 0 if client.ready is None else client.ready.rows + self._max_waiting

    @property
    def restarts(self) -> int:
        return sum(replica.supervisor.restarts for replica in self.replicas)

    @property
    def failure(self) -> BaseException | None:
        """Why one of the engines could not be started at all, or is not looked after any more."""
        failures: list[BaseException | None] = [replica.supervisor.failure for replica in self.replicas]
        failures += [task.exception() for task in self._tasks if task.done() and not task.cancelled()]
        return next((failure for failure in failures if failure is not None), None)

    def generate(self, requests: Sequence[Submit], *, timeout: float | None = None) -> Feed:
        """Have the engines work on `requests`, on at most `window` of them at once.

        What has not ended after `timeout` seconds fails with `TimedOut`. Raises `EngineUnavailable` when no engine is
        ready.
        """
        feed = Feed(self, requests, min(len(requests), self.window), timeout)
        try:
            feed.fill()
        except EngineUnavailable as error:
            feed.__exit__(type(error), error, None)
            raise
        if feed.has_more:
            self._feeds.add(feed)
        return feed

    def forget(self, feed: Feed) -> None:
        """It has ended, or was left."""
        self._feeds.discard(feed)

    def has_place(self, client: EngineClient) -> bool:
        return client.live < self._capacity(client)

    def route(self, request: Submit) -> EngineClient:
        """The engine for the next sequence: of those that are ready the one that has read the beginning of its prompt,
        unless others have much less to do; else the least loaded, the first of equals.

        Raises `EngineUnavailable` when none is ready.
        """
        clients = [replica.client for replica in self.replicas if replica.client.ready is not None]
        if not clients:
            raise EngineUnavailable("the engine is starting: try again in a few seconds")
        least = min(clients, key=lambda client: client.live)
        if len(self.replicas) == 1:
            return least
        keys = beginnings(salted(request.tenant, request.cache_salt), request.prompt_ids)
        known = self._seen.find(keys)
        client = known if known in clients and self._has_time(known, least.live) else least
        self._seen.note(keys, client)
        return client

    def _has_time(self, client: EngineClient, least: int) -> bool:
        """Whether it may be given one more while another has but `least`: reading a prompt again takes longer than
        steps with some more sequences."""
        assert client.ready is not None
        return client.live <= min(least + client.ready.rows // _SLACK, client.ready.rows - 1)

    def fail_all(self, make_error: Callable[[], LatticeError]) -> None:
        """End every live sequence with an error of its own."""
        for replica in self.replicas:
            replica.client.fail_all(make_error)


async def _run(number: int, replica: Replica) -> None:
    structlog.contextvars.bind_contextvars(engine=number)  # in every line that this task logs
    await replica.supervisor.run()
