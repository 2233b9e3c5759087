"""Launching one Triton kernel after another without a pause between them, on GPUs that can (Hopper).

The next kernel is launched while the one before it runs, sets itself up, asks for what does not depend on it, and waits
on the device until it is through ("programmatic dependent launch" in CUDA's guide). Every kernel that is launched so
must `wait` before it reads or writes anything that one of the last few kernels may touch.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

_LINE = tl.constexpr(128)
"""Bytes of a line of the cache."""


def overlaps(device: torch.device) -> bool:
    """Whether kernels on this device may be launched so."""
    return device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device)[0] >= 9


def launch_options(ahead: bool) -> dict[str, Any]:
    """What a kernel with the constant `ahead` is launched with."""
    return {"ahead": True, "launch_pdl": True} if ahead else {"ahead": False}


@triton.jit
def wait() -> None:
    """Let the next kernel come, and wait for the one before this."""
    gdc_launch_dependents()
    gdc_wait()


@triton.jit
def prefetch(
    p_weight: tl.tensor, first: tl.tensor, o_k: tl.tensor, N: tl.constexpr, K: tl.constexpr,
    rows: tl.constexpr, columns: tl.constexpr,
) -> None:  # fmt: skip
    """Bring columns o_k to o_k + columns of `rows` rows of a weight [N, K], from row `first` on, near."""
    width: tl.constexpr = _LINE * 8 // p_weight.dtype.element_ty.primitive_bitwidth
    lines: tl.constexpr = triton.cdiv(columns, width)
    o_n = first + tl.arange(0, rows)
    o_line = o_k + tl.arange(0, triton.next_power_of_2(lines)) * width
    inside = (o_n < N)[:, None] & (o_line < o_k + columns)[None, :] & (o_line < K)[None, :]
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.b32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.b32 $0, 0; }",
        "=r,l,r",
        [p_weight + o_n.to(tl.int64)[:, None] * K + o_line[None, :], inside.to(tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
