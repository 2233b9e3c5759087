"""How much of the CPU there is for this process."""

from __future__ import annotations

import os
from pathlib import Path


def available_cpus() -> int:
    """Processors that this process may use, by its affinity and its control group's quota."""
    try:
        cpus = len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        cpus = os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(cpus, -(-int(quota) // int(period))))
    except (OSError, ValueError):  # no control group, or "max"
        return cpus
