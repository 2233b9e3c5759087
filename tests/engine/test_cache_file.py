from __future__ import annotations

import random
import re
import stat
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lattice_serve.engine import cache_file, replacement
from lattice_serve.engine.cache_contents import Contents
from lattice_serve.engine.cache_file import INDEX, MAGIC, STATE, CacheFile, Entry, Index, StateShape
from lattice_serve.engine.cache_key import CacheKey
from lattice_serve.engine.errors import CacheFileError
from lattice_serve.engine.prefix_cache import PrefixCache
from tests.engine.harness import complete, make_engine, submit

ROW, V = 5, 3
SHAPE = StateShape(ROW, V)
Kept = tuple[str, tuple[int, ...], bool]
kept: st.SearchStrategy[Kept] = st.tuples(
    st.sampled_from(["", "salt"]), st.lists(st.integers(0, 2), min_size=1, max_size=8).map(tuple), st.booleans()
)


def filled(cache: PrefixCache, states: Sequence[Kept]) -> PrefixCache:
    for salt, ids, has_logits in states:
        row = torch.full((ROW,), sum(id + 1 << 2 * place for place, id in enumerate(ids)) + len(salt) / 8)
        cache.put(salt, ids, row, -row[:V] if has_logits else None)
    return cache


def file(path: Path, identity: str = "same", shape: StateShape = SHAPE) -> CacheFile:
    return CacheFile(path, identity, shape)


def save(path: Path, cache: PrefixCache) -> int:
    return file(path).save(Contents(cache))


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
        assert save(path, cache) == len(cache)
        again = PrefixCache([("cpu", 1 << 20)])
        assert file(path).load(again) == len(cache)
        again.check()
        assert content(again) == content(cache)
        small = PrefixCache([("cpu", room)])
        count = file(path).load(small)
        small.check()
        assert content(small) == content(cache)[len(cache) - count :], "not those that were used last"
    cache = filled(PrefixCache([("cpu", 1 << 20)]), states)
    save(path, cache)
    again = PrefixCache([("cpu", 1 << 20)])
    file(path).load(again)
    assert content(filled(again, more)) == content(filled(cache, more)), "what came back does not take more"


def test_an_engine_goes_on_where_another_has_ended(tiny_model: Path, tmp_path: Path) -> None:
    path, prompt = tmp_path / "states", [3 + 7 * i % 100 for i in range(40)]
    request = submit("r", prompt, max_tokens=5, temperature=0, ignore_eos=True, logprobs=2)
    first = make_engine(tiny_model, prefix_cache_memory=1 << 20)
    answer = complete(first, request)
    longer = submit("l", [*prompt, *answer.token_ids, 9], max_tokens=5, temperature=0, ignore_eos=True, logprobs=2)
    shape = StateShape(first.pool.memory.shape[1], first.info.vocab_size)
    assert file(path, shape=shape).save(Contents(first.cache)) == 2
    second = make_engine(tiny_model, prefix_cache_memory=1 << 20)
    assert file(path, shape=shape).load(second.cache) == 2
    for asked, cached in ((request, 40), (longer, 44)):
        expected, answer = complete(first, asked), complete(second, asked)
        assert answer == expected
        assert answer.cached_tokens == expected.cached_tokens == cached
    second.memory.check_idle()


KEPT: list[Kept] = [("", (1, 2), True), ("s", (1, 2, 0), False), ("s", (1,), False)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save(tmp_path / "states", filled(PrefixCache([("cpu", 1 << 20)]), KEPT))
    return tmp_path / "states"


def refused(path: Path, identity: str = "same", shape: StateShape = SHAPE) -> str:
    """Why a file is."""
    cache = PrefixCache([("cpu", 1 << 20)])
    with pytest.raises(CacheFileError) as caught:
        file(path, identity, shape).load(cache)
    assert len(cache) == 0
    cache.check()
    return caught.value.message


def damages(data: bytes) -> Iterator[bytes]:
    for place in range(len(data)):
        yield data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :]
        yield data[:place]
    yield data + b"\0"


def test_a_damaged_file_is_left_alone(path: Path) -> None:
    for data in damages(path.read_bytes()):
        path.write_bytes(data)
        assert "states" in refused(path)


def test_so_is_one_that_was_written_with_another_key(path: Path) -> None:
    key = path.with_name("states.key")
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    mine = key.read_bytes()
    key.write_bytes(mine[::-1])
    assert "another key" in refused(path)
    key.write_bytes(mine[:31])
    assert "give at least 32" in refused(path)
    key.write_bytes(mine)
    key.chmod(0o644)
    assert "set it to 0600" in refused(path)
    key.unlink()
    assert "key" in refused(path)


def test_a_key_can_be_given_and_is_left_as_it_is(tmp_path: Path) -> None:
    key, cache = tmp_path / "key", filled(PrefixCache([("cpu", 1 << 20)]), KEPT)
    key.write_text("k" * 32)
    key.chmod(0o400)
    for name in ("one", "two"):
        CacheFile(tmp_path / name, "same", SHAPE, key).save(Contents(cache))
    (tmp_path / "one").replace(tmp_path / "two")
    assert CacheFile(tmp_path / "two", "same", SHAPE, key).load(PrefixCache([("cpu", 1 << 20)])) == len(cache)
    assert (key.read_text(), sorted(each.name for each in tmp_path.iterdir())) == ("k" * 32, ["key", "two"])


def forge(path: Path, states: bytes, index: bytes) -> None:
    """A file with a right code of its index, whatever that is."""
    key = CacheKey.read(path.with_name(f"{path.name}.key"))
    path.write_bytes(MAGIC + states + index + len(index).to_bytes(8, "little") + key.code(INDEX, index))


def forged_entry(path: Path, number: int = 0, values: Sequence[float] = (1.0,) * ROW, **changes: Any) -> None:
    """Two states with right codes, but for what `changes` says of one, and the `values` that it has."""
    key, rows, entries = CacheKey.read(path.with_name(f"{path.name}.key")), [(1.0,) * ROW] * 2, []
    rows[number] = tuple(values)
    data = [np.array(row, np.float32).tobytes() for row in rows]
    for place in range(2):
        ids = np.array([place + 1], np.int32).tobytes()
        entries.append(Entry(0, place - 1, ids, place, False, key.code(STATE, data[place])))
    entries[number] = msgspec.structs.replace(entries[number], **changes)
    forge(path, b"".join(data), msgspec.msgpack.encode(Index("same", ROW, V, [""], entries)))


@pytest.mark.parametrize(
    "change",
    [
        {"after": 1},
        {"after": -2},
        {"salt": 2},
        {"salt": -1},
        {"ids": b"123"},
        {"ids": b""},
        {"ids": b"\xff\xff\xff\xff"},
        {"ids": bytes([V, 0, 0, 0])},
        {"has_logits": True},
        {"code": b""},
        {"code": b"short"},
        {"values": (float("nan"),) * ROW},
        {"values": (*(0.0,) * (ROW - 1), float("inf"))},
        {"values": (-float("inf"), *(0.0,) * (ROW - 1))},
        {"values": (1.0,) * (ROW - 1)},
        {"values": ()},
    ],
)
@pytest.mark.parametrize("number", [0, 1])
def test_so_is_one_that_cannot_be_though_its_codes_are_right(path: Path, change: dict[str, Any], number: int) -> None:
    forged_entry(path)
    assert file(path).load(PrefixCache([("cpu", 1 << 20)])) == 2
    forged_entry(path, number, **change)
    assert re.search("not fit together|not finite|damaged", refused(path))


@pytest.mark.parametrize("shape", [(0, V), (ROW, 0), (ROW + 1, V), (-ROW, V), (1 << 40, 1 << 40)])
def test_so_is_one_with_states_of_another_shape(path: Path, shape: tuple[int, int]) -> None:
    for entries in ([], [Entry(0, -1, bytes(4), 0, False, bytes(32))]):
        forge(path, b"", msgspec.msgpack.encode(Index("same", *shape, [""], entries)))
        assert "not fit together" in refused(path)


@pytest.mark.parametrize("index", [b"", b"\xc1", b"\x80", b"\xff" * 9, b"\xdb\xff\xff\xff\xff", b"\x91" * 100_000])
def test_so_is_one_whose_index_is_none(path: Path, index: bytes) -> None:
    forge(path, b"", index)
    assert "another version" in refused(path)


def test_so_is_one_with_text_that_is_no_utf_8(path: Path) -> None:
    index = msgspec.msgpack.encode(Index("same", ROW, V, ["salt"], []))
    for text in (b"same", b"salt", b"salts"):
        forge(path, b"", index.replace(text, b"\xff" + text[1:]))
        assert "another version" in refused(path)


def test_mutations_with_right_codes_are_refused_or_whole(path: Path) -> None:
    """Whatever the index says, it is refused, or what is loaded is sound."""
    states = path.read_bytes()
    size = int.from_bytes(states[-40:-32], "little")
    states, index = states[len(MAGIC) : -40 - size], states[-40 - size : -40]
    draw, taken = random.Random(5), 0
    for _ in range(2000):
        mutated = bytearray(index)
        for _ in range(draw.choice([1, 1, 2, 8])):
            mutated[draw.randrange(len(mutated))] = draw.choice([0, 1, 0x7F, 0x80, 0xC0, 0xFF, draw.randrange(256)])
        forge(path, states, bytes(mutated))
        cache = PrefixCache([("cpu", 1 << 20)])
        try:
            taken += file(path).load(cache)
        except CacheFileError:
            assert len(cache) == 0
        cache.check()
        assert all(snapshot.row.isfinite().all() for snapshot in cache.snapshots())
    assert taken > 0, "nothing was like what an engine writes"


def test_so_is_one_of_another_engine_and_none_at_all(path: Path) -> None:
    assert "another model, version or kind of processor" in refused(path, "other")
    path.unlink()
    assert "cannot be read" in refused(path)


def test_a_folder_in_its_place_is_said(path: Path) -> None:
    path.unlink()
    path.mkdir()
    assert "cannot be read" in refused(path)
    with pytest.raises(CacheFileError, match="cannot be written: Is a directory"):
        save(path, PrefixCache([("cpu", 1 << 20)]))


def test_it_is_for_its_owners_eyes_alone_and_replaced_when_it_is_whole(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    before = path.read_bytes()

    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(CacheFileError, match="No space left"):
        save(path, PrefixCache([("cpu", 1 << 20)]))
    assert sorted(each.name for each in path.parent.iterdir()) == ["states", "states.key"]
    assert path.read_bytes() == before


def test_what_goes_while_it_is_written_is_left_out(tmp_path: Path) -> None:
    """And what follows it is there all the same; memory that another state has by now is nobody's."""
    path, cache = tmp_path / "states", PrefixCache([("cpu", 1 << 20)])
    filled(cache, [("", (1,), False), ("", (1, 2), True), ("", (1, 2, 0), False)])
    before = content(cache)
    contents = Contents(cache)
    written: list[bool] = []

    def change() -> None:
        if not written:
            cache.discard("", [1, 2])
            filled(cache, [("", (2,), True)])
        written.append(True)

    assert file(path).save(contents, after_each=change) == 2
    again = PrefixCache([("cpu", 1 << 20)])
    assert file(path).load(again) == 2
    again.check()
    assert content(again) == [before[0], before[2]]


KILLED = """
import os, sys
from pathlib import Path
from lattice_serve.engine.replacement import replacing
with replacing(Path(sys.argv[1])) as file:
    file.write(bytes(1 << 20))
    file.flush()
    print("written", flush=True)
    sys.stdin.read()
"""


def test_what_a_killed_writer_leaves_is_cleared_up_and_what_a_living_one_has_is_not(path: Path) -> None:
    before = path.read_bytes()
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        assert replacement.clear_unfinished(path) == 0
        with pytest.raises(CacheFileError, match="another process is writing it"):
            save(path, PrefixCache([("cpu", 1 << 20)]))
        assert len(list(path.parent.iterdir())) == 3
        writer.kill()
    assert replacement.clear_unfinished(path) == 1 << 20
    assert replacement.clear_unfinished(path) == 0
    assert sorted(each.name for each in path.parent.iterdir()) == ["states", "states.key"]
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
