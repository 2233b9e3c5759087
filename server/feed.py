"""The sequences of a request on their way to the engines."""

from __future__ import annotations

from collections.abc import Coroutine, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from lattice_serve.engine.messages import Submit, TokenOutput
from lattice_serve.server.engine_client import EngineClient, Generation
from lattice_serve.server.errors import TimedOut

if TYPE_CHECKING:
    from lattice_serve.server.router import Router


class Feed(Generation):
    """A generation that holds a number of places, and submits its next sequence when one of those that have them ends.

    A long list of prompts so fills no queue, and waits for nobody: its places are its own until it needs fewer.
    """

    def __init__(self, router: Router, requests: Sequence[Submit], places: int, timeout: float | None) -> None:
        super().__init__(timeout)
        self._router = router
        self._requests = requests
        self.tenant = requests[0].tenant if requests else ""
        """Whose places it holds."""
        self._places = places
        self._next = 0
        """Index of the first one that is not submitted."""
        self._client: EngineClient | None = None

    @property
    def has_more(self) -> bool:
        """Whether a sequence waits to be submitted."""
        return self._next < len(self._requests)

    @property
    def unused(self) -> int:
        """Places that it holds, but for the moment does not use."""
        return max(0, min(self._places - len(self.open), len(self._requests) - self._next))

    def fill(self) -> None:
        """Submit what there are places for, those with one prompt to one engine, which then runs it once.

        Raises `EngineUnavailable` when no engine is ready.
        """
        for _ in range(self.unused):
            request = self._requests[self._next]
            same = self._next > 0 and request.prompt_ids is self._requests[self._next - 1].prompt_ids
            if self._client is None or not same or not self._router.has_place(self._client):
                self._client = self._router.route(request)
            self._client.submit(self, self._next, request)
            self._next += 1

    def __anext__(self) -> Coroutine[Any, Any, tuple[int, TokenOutput]]:
        if self._next < len(self._requests):
            self.fill()
        return super().__anext__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._next = len(self._requests)
        self._router.forget(self)
        super().__exit__(kind, error, trace)

    def _time_out(self, error: TimedOut) -> None:
        if self.unused:  # nothing may be open for the moment, yet not all has come
            self.put(error)
        else:
            super()._time_out(error)
