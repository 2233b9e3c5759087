"""What Numba keeps of compiled kernels: neither wrong nor needed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lattice_serve.kernels.numba import cache as compiled
from tests.confined import MEMORY, as_nobody, needs_confinement, read_only

DRAW = "from lattice_serve.kernels.sampling import draw; print(draw.__name__)"
KEPT = "from lattice_serve.kernels import sampling; print(sum(sampling._pick.stats.cache_hits.values()))"
REMEDY = "set NUMBA_CACHE_DIR to a folder that can be written"
SCRIPT = """
import errno, os
from numba.core import caching

def full(self, key, data):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

caching.IndexDataCacheFile.save = full
from lattice_serve.kernels.sampling import draw
print(draw.__name__)
"""


def test_a_full_disk_keeps_nobody_from_compiling(tmp_path: Path) -> None:
    environment = {"NUMBA_CACHE_DIR": str(tmp_path), "PYTHONWARNINGS": "always"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=os.environ | environment)
    assert (done.returncode, done.stdout) == (0, "draw\n"), done.stderr
    assert done.stderr.count("compiled kernels are not kept, the next start compiles them again: No space left") == 1


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """As a service: without a home, and with no folder for temporary files but the memory's."""
    whole = os.environ | {"HOME": "/nonexistent", "TMPDIR": MEMORY, "PYTHONWARNINGS": "default"} | environment
    done = subprocess.run(command, capture_output=True, text=True, env=whole, cwd="/")
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture
def open_folder(tmp_path: Path) -> Path:
    """One that everybody may read."""
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    return tmp_path


@needs_confinement
@pytest.mark.parametrize(
    ("confine", "reason"), [(as_nobody, "Permission denied"), (read_only, "Read-only file system")]
)
def test_without_a_folder_to_keep_them_kernels_are_compiled(
    confine: Callable[..., list[str]], reason: str, tmp_path: Path
) -> None:
    done = run(confine(sys.executable, "-c", DRAW), NUMBA_CACHE_DIR=str(tmp_path / "kernels"))
    assert done.stdout == "draw\n"
    assert done.stderr.count("Warning") == 1
    assert f"{reason}: {REMEDY}" in done.stderr


@needs_confinement
@pytest.mark.parametrize("confine", [as_nobody, read_only])
def test_what_an_image_has_compiled_is_used_where_nothing_can_be_written(
    confine: Callable[..., list[str]], open_folder: Path
) -> None:
    command, folder = [sys.executable, "-c", KEPT], str(open_folder / "kernels")
    assert run(command, NUMBA_CACHE_DIR=folder).stdout == "0\n"
    done = run(confine(*command), NUMBA_CACHE_DIR=folder)
    assert (int(done.stdout) > 0, done.stderr) == (True, "")


def test_damaged_files_are_compiled_again(tmp_path: Path) -> None:
    command, folder = [sys.executable, "-c", KEPT], str(tmp_path)
    run(command, NUMBA_CACHE_DIR=folder)
    for path in tmp_path.rglob("*.nb?"):
        path.write_bytes(path.read_bytes()[:20])
    assert run(command, NUMBA_CACHE_DIR=folder).stdout == "0\n"
    assert run(command, NUMBA_CACHE_DIR=folder).stdout != "0\n"


def test_what_was_compiled_is_good_until_any_kernel_changes(tmp_path: Path) -> None:
    """One that is called, too: Numba by itself looks only at the file of the one that calls."""
    sources = tmp_path / "lattice_serve" / "kernels"
    shutil.copytree(Path(compiled.__file__).parents[1], sources, ignore=shutil.ignore_patterns("__pycache__"))
    lines = (
        "import numpy as np",
        "from lattice_serve.kernels.pointwise.cpu import swiglu",
        "out = np.zeros(16, np.float32)",
        "swiglu(np.ones(32, np.float32), 0, 16, out, 0, 16, 0)",
        "print(out[0], sum(swiglu.stats.cache_hits.values()))",
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "NUMBA_CACHE_DIR": str(tmp_path / "cache")}

    def compile_and_run() -> tuple[float, int]:
        """Silu of 1, and how often what was compiled before was good."""
        command = [sys.executable, "-c", "\n".join(lines)]
        value, hits = subprocess.run(command, env=environment, check=True, capture_output=True).stdout.split()
        return round(float(value), 3), int(hits)

    assert [compile_and_run(), compile_and_run()] == [(0.731, 0), (0.731, 1)]
    called = sources / "numba" / "math.py"
    called.write_text(called.read_text().replace("return x * sigmoid(x)", "return x + sigmoid(x)"))
    assert compile_and_run() == (1.731, 0)
