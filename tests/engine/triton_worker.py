"""A worker of tensor parallelism that runs its share on Triton's kernels, wherever it is."""

from __future__ import annotations

import sys

from lattice_serve.engine.tensor_parallel import worker
from tests.engine.backends import triton_backend

if __name__ == "__main__":
    setattr(worker, "make_backend", triton_backend)  # noqa: B010
    sys.exit(worker.main())
