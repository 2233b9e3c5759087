from __future__ import annotations

from typing import Any

import pytest

from lattice_serve.engine.errors import ResponseNotFound
from lattice_serve.engine.shares import Shares
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


@pytest.mark.parametrize("limits", [{"max_responses": 10}, {"max_bytes": 120}], ids=str)
def test_a_tenant_pushes_out_its_own(limits: dict[str, Any]) -> None:
    store = ResponseStore(**limits)
    for number in range(5):
        store.put("polite", f"{number}", b"x" * 10, [])
    for number in range(100):
        store.put("greedy", f"{number}", b"x" * 10, [])
    for tenant, number in [*(("polite", number) for number in range(5)), ("greedy", 99)]:
        assert store.get(tenant, f"{number}").body == b"x" * 10
    with pytest.raises(ResponseNotFound):
        store.get("greedy", "90")


def test_weights_part_the_store() -> None:
    shares = Shares()
    shares.weigh("heavy", 4)
    store = ResponseStore(max_responses=10, shares=shares)
    for number in range(20):
        for tenant in ("heavy", "light"):
            store.put(tenant, f"{number}", b"", [])

    def kept(tenant: str) -> int:
        return len(store._stored[tenant])

    assert (kept("heavy"), kept("light")) == (8, 2)
