"""What the CPU of this machine can do."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import llvmlite.binding as llvm

_BF16 = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""As Linux names them on x86-64, the first two, and on arm64."""

_VECTORS = (("avx512f", "AVX-512"), ("avx2", "AVX2"), ("avx", "AVX"), ("sse2", "SSE2"), ("neon", "NEON"))
"""As LLVM names them, widest first."""


@cache
def vectors() -> str:
    """Name of the widest vectors that kernels are compiled for, "scalar" where none is known."""
    features = llvm.get_host_cpu_features()
    return next((name for feature, name in _VECTORS if features.get(feature)), "scalar")


@cache
def has_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether matrix products of bfloat16 run in hardware; False where `cpuinfo` cannot be read."""
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    for line in text.splitlines():
        key, _, flags = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return not _BF16.isdisjoint(flags.split())
    return False
