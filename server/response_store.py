"""Responses that later ones may go on from: in memory, the last used ones, each for the key that made it alone."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import msgspec

from lattice_serve.engine.errors import ResponseNotFound

MAX_RESPONSES = 10_000
MAX_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class StoredResponse:
    body: bytes
    """The response as JSON."""
    messages: bytes
    """The conversation up to its end, as JSON."""

    @property
    def nbytes(self) -> int:
        return len(self.body) + len(self.messages)


class ResponseStore:
    """A response is found by the salt of its key and its id."""

    def __init__(self, max_responses: int = MAX_RESPONSES, max_bytes: int = MAX_BYTES) -> None:
        self._max_responses, self._max_bytes = max_responses, max_bytes
        self._stored: OrderedDict[tuple[str, str], StoredResponse] = OrderedDict()
        self._bytes = 0

    def put(self, salt: str, response_id: str, body: bytes, messages: list[dict[str, Any]]) -> None:
        stored = StoredResponse(body, msgspec.json.encode(messages))
        self._stored[salt, response_id] = stored
        self._bytes += stored.nbytes
        while len(self._stored) > self._max_responses or self._bytes > self._max_bytes:
            self._bytes -= self._stored.popitem(last=False)[1].nbytes

    def get(self, salt: str, response_id: str, param: str | None = None) -> StoredResponse:
        """Raises `ResponseNotFound`, naming `param`."""
        stored = self._stored.get((salt, response_id))
        if stored is None:
            raise ResponseNotFound(
                f"there is no response {response_id[:100]!r}: it was not stored, not lately used, or is another key's",
                param=param,
            )
        self._stored.move_to_end((salt, response_id))
        return stored

    def delete(self, salt: str, response_id: str) -> None:
        """Raises `ResponseNotFound`."""
        self._bytes -= self.get(salt, response_id).nbytes
        del self._stored[salt, response_id]
