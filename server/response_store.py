"""Responses that later ones may go on from: in memory, the last used ones, each for the key that made it alone.

Where there are too many, the key that has most for its weight loses its oldest.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from dataclasses import dataclass
from typing import Any

import msgspec

from lattice_serve.engine.errors import ResponseNotFound
from lattice_serve.engine.shares import Shares

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
    """A response is found by its key's tenant and its id."""

    def __init__(
        self, max_responses: int = MAX_RESPONSES, max_bytes: int = MAX_BYTES, shares: Shares | None = None
    ) -> None:
        """shares: the weights of the tenants; None: all have the same."""
        self._max_responses, self._max_bytes = max_responses, max_bytes
        self._shares = shares or Shares()
        self._stored: dict[str, OrderedDict[str, StoredResponse]] = {}
        """Of the tenants that have any, each the least recently used first."""
        self._bytes: Counter[str] = Counter()

    def put(self, tenant: str, response_id: str, body: bytes, messages: list[dict[str, Any]]) -> None:
        stored = StoredResponse(body, msgspec.json.encode(messages))
        self._stored.setdefault(tenant, OrderedDict())[response_id] = stored
        self._bytes[tenant] += stored.nbytes
        while sum(map(len, self._stored.values())) > self._max_responses or self._bytes.total() > self._max_bytes:
            most = self._shares.most_over({each: self._used(each) for each in self._stored})
            self._remove(most, next(iter(self._stored[most])))

    def get(self, tenant: str, response_id: str, param: str | None = None) -> StoredResponse:
        """Raises `ResponseNotFound`, naming `param`."""
        stored = self._stored[tenant].get(response_id) if tenant in self._stored else None
        if stored is None:
            raise ResponseNotFound(
                f"there is no response {response_id[:100]!r}: it was not stored, not lately used, or is another key's",
                param=param,
            )
        self._stored[tenant].move_to_end(response_id)
        return stored

    def delete(self, tenant: str, response_id: str) -> None:
        """Raises `ResponseNotFound`."""
        self.get(tenant, response_id)
        self._remove(tenant, response_id)

    def _used(self, tenant: str) -> float:
        """How much of the store a tenant has, by number or by bytes."""
        return max(len(self._stored[tenant]) / self._max_responses, self._bytes[tenant] / self._max_bytes)

    def _remove(self, tenant: str, response_id: str) -> None:
        self._bytes[tenant] -= self._stored[tenant].pop(response_id).nbytes
        if not self._stored[tenant]:
            del self._stored[tenant], self._bytes[tenant]
