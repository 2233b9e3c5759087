from __future__ import annotations

import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lattice_serve.engine import cache_file
from lattice_serve.engine.errors import CacheFileError
from lattice_serve.engine.prefix_cache import PrefixCache
from tests.engine.harness import complete, make_engine, submit

ROW, V = 5, 3
Kept = tuple[str, tuple[int, ...], bool]
kept: st.SearchStrategy[Kept] = st.tuples(
    st.sampled_from(["", "salt"]), st.lists(st.integers(0, 2), min_size=1, max_size=8).map(tuple), st.booleans()
)


def filled(cache: PrefixCache, states: Sequence[Kept]) -> PrefixCache:
    for salt, ids, has_logits in states:
        row = torch.full((ROW,), sum(id + 1 << 2 * place for place, id in enumerate(ids)) + len(salt) / 8)
        cache.put(salt, ids, row, -row[:V] if has_logits else None)
    return cache


def content(cache: PrefixCache) -> list[tuple[str, tuple[int, ...], list[float], list[float] | None]]:
    """All that a cache has, the least recently used first."""
    everything = []
    for snapshot in cache.snapshots():
        node, ids = snapshot.node, snapshot.node.edge.tolist()
        while node.parent is not None:
            node = node.parent
            ids = node.edge.tolist() + ids
        assert len(ids) == snapshot.length
        logits = None if snapshot.logits is None else snapshot.logits.tolist()
        everything.append((snapshot.salt, tuple(ids), snapshot.row.tolist(), logits))
    return everything


@settings(max_examples=60)
@given(states=st.lists(kept, max_size=20), more=st.lists(kept, max_size=5), room=st.integers(0, 400))
def test_what_was_cached_comes_back(
    tmp_path_factory: pytest.TempPathFactory, states: list[Kept], more: list[Kept], room: int
) -> None:
    path = tmp_path_factory.mktemp("cache") / "states"
    for budgets in ([("cpu", 1 << 20)], [("cpu", 200), ("cpu", 1 << 20)]):
        cache = filled(PrefixCache(budgets), states)
        assert cache_file.save(path, cache, "same") == len(cache)
        again = PrefixCache([("cpu", 1 << 20)])
        assert cache_file.load(path, again, "same") == len(cache)
        again.check()
        assert content(again) == content(cache)
        small = PrefixCache([("cpu", room)])
        count = cache_file.load(path, small, "same")
        small.check()
        assert content(small) == content(cache)[len(cache) - count :], "not those that were used last"
    cache = filled(PrefixCache([("cpu", 1 << 20)]), states)
    cache_file.save(path, cache, "same")
    again = PrefixCache([("cpu", 1 << 20)])
    cache_file.load(path, again, "same")
    assert content(filled(again, more)) == content(filled(cache, more)), "what came back does not take more"


def test_an_engine_goes_on_where_another_has_ended(tiny_model: Path, tmp_path: Path) -> None:
    path, prompt = tmp_path / "states", [3 + 7 * i % 100 for i in range(40)]
    request = submit("r", prompt, max_tokens=5, temperature=0, ignore_eos=True, logprobs=2)
    first = make_engine(tiny_model, prefix_cache_memory=1 << 20)
    answer = complete(first, request)
    longer = submit("l", [*prompt, *answer.token_ids, 9], max_tokens=5, temperature=0, ignore_eos=True, logprobs=2)
    assert cache_file.save(path, first.cache, "same") == 2
    second = make_engine(tiny_model, prefix_cache_memory=1 << 20)
    assert cache_file.load(path, second.cache, "same") == 2
    for asked, cached in ((request, 40), (longer, 44)):
        expected, answer = complete(first, asked), complete(second, asked)
        assert answer == expected
        assert answer.cached_tokens == expected.cached_tokens == cached
    second.memory.check_idle()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    cache = filled(PrefixCache([("cpu", 1 << 20)]), [("", (1, 2), True), ("s", (1, 2, 3), False), ("s", (1,), False)])
    cache_file.save(tmp_path / "states", cache, "same")
    return tmp_path / "states"


def damages(data: bytes) -> Iterator[bytes]:
    for place in range(0, len(data), 7):
        yield data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :]
        yield data[:place]
    yield data + b"\0"


def test_a_damaged_file_is_left_alone(path: Path) -> None:
    for data in damages(path.read_bytes()):
        path.write_bytes(data)
        cache = PrefixCache([("cpu", 1 << 20)])
        with pytest.raises(CacheFileError, match="states"):
            cache_file.load(path, cache, "same")
        assert len(cache) == 0


@pytest.mark.parametrize(
    "change", [{"after": 1}, {"after": -2}, {"salt": 2}, {"ids": b"123"}, {"ids": b""}, {"has_logits": True}]
)
def test_so_is_one_that_cannot_be(path: Path, change: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    class Changed(cache_file._Entry, frozen=True, array_like=True):
        def __post_init__(self) -> None:
            if self.after < 0 and not self.has_logits:
                for name, value in change.items():
                    msgspec.structs.force_setattr(self, name, value)

    with monkeypatch.context() as patch:
        patch.setattr(cache_file, "_Entry", Changed)
        cache = filled(PrefixCache([("cpu", 1 << 20)]), [("", (1, 2), True), ("s", (1, 2, 3), False)])
        cache_file.save(path, cache, "same")
    empty = PrefixCache([("cpu", 1 << 20)])
    with pytest.raises(CacheFileError, match="do not fit together"):
        cache_file.load(path, empty, "same")
    assert len(empty) == 0


def test_so_is_one_of_another_engine_and_none_at_all(path: Path) -> None:
    cache = PrefixCache([("cpu", 1 << 20)])
    with pytest.raises(CacheFileError, match="another model, version or kind of processor"):
        cache_file.load(path, cache, "other")
    with pytest.raises(CacheFileError, match="cannot be read"):
        cache_file.load(path.with_name("none"), cache, "same")
    assert len(cache) == 0


def test_it_is_for_its_owners_eyes_alone_and_replaced_when_it_is_whole(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    before = path.read_bytes()

    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(CacheFileError, match="No space left"):
        cache_file.save(path, PrefixCache([("cpu", 1 << 20)]), "same")
    assert [each.name for each in path.parent.iterdir()] == ["states"]
    assert path.read_bytes() == before


def test_identity_is_of_the_weights_and_of_how_they_are_multiplied(tiny_model: Path, tmp_path: Path) -> None:
    for file in tiny_model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    mine = cache_file.identity(tmp_path, "AVX2", "bfloat16", 1)
    assert mine == cache_file.identity(tiny_model, "AVX2", "bfloat16", 1)
    assert mine != cache_file.identity(tmp_path, "AVX-512", "bfloat16", 1)
    weights = next(tmp_path.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    assert mine != cache_file.identity(tmp_path, "AVX2", "bfloat16", 1)
