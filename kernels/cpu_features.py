"""What the CPU of this machine can do in hardware."""

from __future__ import annotations

from functools import cache
from pathlib import Path

_BF16 = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""As Linux names them on x86-64, the first two, and on arm64."""


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
