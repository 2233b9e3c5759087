"""What Numba keeps of compiled kernels: neither wrong nor needed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from lattice_serve.kernels.numba import cache as compiled

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

    def run() -> tuple[float, int]:
        """Silu of 1, and how often what was compiled before was good."""
        command = [sys.executable, "-c", "\n".join(lines)]
        value, hits = subprocess.run(command, env=environment, check=True, capture_output=True).stdout.split()
        return round(float(value), 3), int(hits)

    assert [run(), run()] == [(0.731, 0), (0.731, 1)]
    called = sources / "numba" / "math.py"
    called.write_text(called.read_text().replace("return x * sigmoid(x)", "return x + sigmoid(x)"))
    assert run() == (1.731, 0)
