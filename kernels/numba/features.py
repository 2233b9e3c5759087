"""What the CPU of this machine can do."""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from pathlib import Path
from typing import Literal, TypeAlias

import llvmlite.binding as llvm

Products: TypeAlias = Literal["amx_int8", "avx512_vnni", "amx", "avx512_bf16", "float32"]
"""What multiplies: tiles of int8, vectors of fours of int8, tiles of bfloat16, vectors of pairs of bfloat16, or fused
multiply-adds of float32 after widening weights that are none."""

Stored: TypeAlias = Literal["float32", "bfloat16", "int8"]
"""What a matrix is kept as."""

_NEEDED: dict[Stored, dict[Products, tuple[str, ...]]] = {
    "float32": {},
    "bfloat16": {"amx": ("avx512f", "amx-tile", "amx-bf16"), "avx512_bf16": ("avx512f", "avx512bf16")},
    "int8": {
        "amx_int8": ("avx512f", "avx512vnni", "amx-tile", "amx-int8"),  # few rows are left to vectors
        "avx512_vnni": ("avx512f", "avx512vnni"),
    },
}
"""As LLVM names them; the fastest first."""

_BF16 = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""As Linux names them on x86-64, the first two, and on arm64."""

_VECTORS = (("avx512f", "AVX-512"), ("avx2", "AVX2"), ("avx", "AVX"), ("sse2", "SSE2"), ("neon", "NEON"))
"""As LLVM names them, widest first."""

_ARCH_PRCTL, _REQUEST_PERMISSION, _TILES = 158, 0x1023, 18
"""Linux on x86-64: a process asks once before its threads may use AMX."""


@cache
def vectors() -> str:
    """Name of the widest vectors that kernels are compiled for, "scalar" where none is known."""
    features = llvm.get_host_cpu_features()
    return next((name for feature, name in _VECTORS if features.get(feature)), "scalar")


@cache
def has_vector_bf16() -> bool:
    """Whether vectors of bfloat16 are rounded and multiplied by instructions."""
    features = llvm.get_host_cpu_features()
    return all(map(features.get, _NEEDED["bfloat16"]["avx512_bf16"]))


@cache
def available_products(stored: Stored) -> tuple[Products, ...]:
    """All that this processor has for such weights and the system lets this process use, the fastest first."""
    features = llvm.get_host_cpu_features()
    found: list[Products] = []
    for products, needed in _NEEDED[stored].items():
        if all(map(features.get, needed)) and ("amx-tile" not in needed or _may_use_tiles()):
            found.append(products)
    return *found, "float32"


def _may_use_tiles() -> bool:
    if sys.platform != "linux":
        return False
    return ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILES) == 0


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
