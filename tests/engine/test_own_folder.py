"""Temporary folders of processes that were killed go when the next one is made, and nobody else's do."""

from __future__ import annotations

import fcntl
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from lattice_serve.engine import own_folder
from lattice_serve.engine.own_folder import PREFIX, OwnFolder

LIVING = """
import sys
from lattice_serve.engine.own_folder import OwnFolder
with OwnFolder() as folder:
    (folder / "engine.sock").touch()
    print(folder, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


def test_it_goes_with_its_block() -> None:
    with OwnFolder() as folder:
        assert folder.stat().st_mode & 0o777 == 0o700
        (folder / "file").touch()
    assert not folder.exists()


def test_a_killed_process_leaves_its_folder_to_the_next_and_a_living_one_keeps_it(temporary: Path) -> None:
    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", LIVING], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    with start() as killed, start() as living:
        assert killed.stdout is not None
        assert living.stdout is not None
        left, kept = (Path(each.stdout.readline().decode().strip()) for each in (killed, living) if each.stdout)
        others = [temporary / "lattice-other", temporary / "other"]
        for other in others:
            other.mkdir()
        (temporary / f"{PREFIX}link").symlink_to(others[1])
        with OwnFolder():
            assert left.exists()
        killed.kill()
        killed.wait()
        with OwnFolder() as mine:
            assert not left.exists()
            assert all(each.exists() for each in (mine, kept / "engine.sock", *others))
        assert living.stdin is not None
        living.stdin.close()
        assert living.wait(20) == 0
    assert not kept.exists()


def test_a_folder_that_is_taken_before_it_is_locked_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    mkdtemp, lock, made = tempfile.mkdtemp, fcntl.flock, 0

    def taken_at_once(prefix: str, dir: str) -> str:
        nonlocal made
        made += 1
        path = mkdtemp(prefix=prefix, dir=dir)
        if made == 1:
            own_folder.clear_abandoned()
        return path

    def taken_when_open(file: int, how: int) -> None:
        if made == 2 and how == fcntl.LOCK_SH:
            own_folder.clear_abandoned()
        lock(file, how)

    monkeypatch.setattr(tempfile, "mkdtemp", taken_at_once)
    monkeypatch.setattr(fcntl, "flock", taken_when_open)
    with OwnFolder() as folder:
        assert folder.exists()
        assert made == 3
