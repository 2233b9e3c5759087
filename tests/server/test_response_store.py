from __future__ import annotations

import pytest

from lattice_serve.engine.errors import ResponseNotFound
from lattice_serve.server.response_store import ResponseStore


def test_each_key_sees_its_own() -> None:
    store = ResponseStore()
    store.put("a", "resp_1", b"{}", [{"role": "user", "content": "x"}])
    assert store.get("a", "resp_1").messages == b'[{"role":"user","content":"x"}]'
    with pytest.raises(ResponseNotFound, match="resp_1") as caught:
        store.get("b", "resp_1", "previous_response_id")
    assert (caught.value.status, caught.value.param) == (404, "previous_response_id")


def test_the_least_recently_used_go_first() -> None:
    store = ResponseStore(max_responses=3)
    for name in ("1", "2", "3"):
        store.put("", name, b"", [])
    store.get("", "1")
    store.put("", "4", b"", [])
    with pytest.raises(ResponseNotFound):
        store.get("", "2")
    assert all(store.get("", name) for name in ("1", "3", "4"))


def test_bytes_are_bounded_and_counted() -> None:
    store = ResponseStore(max_bytes=100)
    for name in ("1", "2"):
        store.put("", name, b"x" * 40, [])
    store.delete("", "1")
    with pytest.raises(ResponseNotFound):
        store.delete("", "1")
    store.put("", "3", b"x" * 40, [])
    store.get("", "2")
    store.put("", "4", b"x" * 40, [])
    with pytest.raises(ResponseNotFound):
        store.get("", "3")
    store.put("", "huge", b"x" * 200, [])
    for name in ("2", "4", "huge"):
        with pytest.raises(ResponseNotFound):
            store.get("", name)
    store.put("", "5", b"x" * 90, [])
    assert store.get("", "5").body == b"x" * 90
