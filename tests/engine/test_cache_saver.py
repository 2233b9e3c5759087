"""The cache is saved from time to time, while the engine goes on and when it ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lattice_serve.engine.cache_file import CacheFile, StateShape
from lattice_serve.engine.cache_saver import CacheSaver
from lattice_serve.engine.errors import CacheFileError
from lattice_serve.engine.prefix_cache import PrefixCache
from tests.server.harness import wait_for

SHAPE = StateShape(5, 300)


@pytest.fixture
def cache() -> PrefixCache:
    return PrefixCache([("cpu", 1 << 20)])


@pytest.fixture
def file(tmp_path: Path) -> CacheFile:
    return CacheFile(tmp_path / "states", "same", SHAPE)


def put(cache: PrefixCache, *ids: int) -> None:
    cache.put("", ids, torch.full((SHAPE.row_size,), float(sum(ids))))


def tick_until_saved(saver: CacheSaver, file: CacheFile, states: int) -> None:
    def there() -> bool:
        saver.tick()
        return saved(file) == states

    wait_for(there)


def saved(file: CacheFile) -> int:
    cache = PrefixCache([("cpu", 1 << 20)])
    try:
        return file.load(cache)
    except CacheFileError:
        return 0


def test_what_has_come_is_saved_when_it_is_time(file: CacheFile, cache: PrefixCache) -> None:
    saver = CacheSaver(file, cache, 0.5)
    assert saver.wait_seconds is None, "there is nothing to save"
    put(cache, 1)
    saver.tick()
    assert saved(file) == 0, "it is not time yet"
    seconds = saver.wait_seconds
    assert seconds is not None
    assert 0 < seconds <= 0.5
    tick_until_saved(saver, file, 1)
    wait_for(lambda: saver.wait_seconds is None)
    put(cache, 2)
    tick_until_saved(saver, file, 2)


def test_without_an_interval_it_is_saved_at_the_end_alone(file: CacheFile, cache: PrefixCache) -> None:
    saver = CacheSaver(file, cache, 0)
    put(cache, 1)
    assert saver.wait_seconds is None
    saver.tick()
    saver.close()
    assert saved(file) == 1


def test_the_end_does_not_wait_for_a_save_under_way(
    file: CacheFile, cache: PrefixCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lattice_serve.engine.cache_saver._REST", 1e9)
    saver = CacheSaver(file, cache, 1e-9)
    for id in range(100):
        put(cache, id)
    saver.tick()
    saver.close()
    assert saved(file) == 100


def test_a_cache_that_changes_is_saved_whole(file: CacheFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are used again at once by others, and no state in the file has another's numbers."""
    monkeypatch.setattr("lattice_serve.engine.cache_saver._REST", 0)
    cache = PrefixCache([("cpu", 4 * SHAPE.row_size * 64 + 4 * 64)])
    saver = CacheSaver(file, cache, 1e-9)
    for id in range(64):
        put(cache, id)
    draw = 0
    saves: list[Any] = []
    while len(saves) < 20:
        draw = (draw * 5 + 77) % 299
        put(cache, draw)
        saver.tick()
        if not saver._writing and file.path.exists():
            again = PrefixCache([("cpu", 1 << 20)])
            file.load(again)
            assert all(snapshot.row.tolist() == [float(snapshot.node.edge[0])] * 5 for snapshot in again.snapshots())
            saves.append(len(again))
    saver.close()
    assert saved(file) == len(cache)


def test_a_disk_that_is_full_is_said_and_tried_again(
    file: CacheFile, cache: PrefixCache, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    saver = CacheSaver(file, cache, 1e-9)
    put(cache, 1)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        saver.tick()
        wait_for(lambda: not saver._writing)
    assert "cached states were not saved" in capfd.readouterr().err
    put(cache, 2)
    saver.tick()
    wait_for(lambda: saved(file) == 2)
