"""What requests hold in the server's memory, all of them together: bodies, prompts, and answers that are sent whole."""

from __future__ import annotations

from contextvars import ContextVar
from types import TracebackType

from lattice_serve.engine.errors import Overloaded


class MemoryBudget:
    """Shared by all requests of a server."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.used = 0

    def request(self) -> RequestMemory:
        """What a request holds, empty as yet. `with` it, `hold` adds to it."""
        return RequestMemory(self)


class RequestMemory:
    """Given back at the end of the `with` block."""

    def __init__(self, budget: MemoryBudget) -> None:
        self._budget = budget
        self._used = 0

    @property
    def longest_answer(self) -> int:
        """Bytes of an answer that is sent whole."""
        return self._budget.size // 8

    def hold(self, size: int) -> None:
        """Raises `Overloaded` where there is no room for `size` bytes more beside other requests."""
        budget = self._budget
        # Who is alone gets in: no limit on a body or an answer may be made smaller by this one.
        if budget.used + size > budget.size and budget.used > self._used:
            raise Overloaded(
                f"requests hold {budget.used} bytes of the {budget.size} that they may together: try again later"
            )
        budget.used += size
        self._used += size

    def __enter__(self) -> RequestMemory:
        self._token = _current.set(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _current.reset(self._token)
        self._budget.used -= self._used
        self._used = 0


_current: ContextVar[RequestMemory] = ContextVar("request_memory")


def current() -> RequestMemory:
    """That of the request at hand; of what is no request, without a limit."""
    return _current.get(None) or RequestMemory(MemoryBudget(1 << 62))
