"""What every test shares."""

from __future__ import annotations

import os

# Read when torch is loaded: threads that spin while they wait keep those that work from a busy machine's cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from hypothesis import HealthCheck, settings

# Read when triton is loaded: without a GPU its kernels are run by its interpreter, on tensors of the CPU.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Tensors are small here: a second thread costs more than it brings, and the processes that tests start inherit this.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

# A busy machine is no failure, so no deadline; in CI the same examples every time.
settings.register_profile("default", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", settings.get_profile("default"), derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")
