"""Dependent launches: on NVIDIA's Hopper GPUs a kernel may begin before the one before it has wholly ended.

It begins when the programs of that one are through, or have let it begin, while their last writes are still under way.
So it asks for what it can by itself, and then waits. No more than two launches are ever on their way: what runs before
the wait may count on all launches but the one before.

One launch alone lets the next begin, in prefill. Where all did, programs lay where there was room first, several on one
multiprocessor: decode of 256 rows took a seventh longer for it on an H200, of one a thirtieth less. Blackwell
has them, too; there nobody has looked.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

_GRAPHS_HOLD_THEM = 12030
"""The CUDA version, as `driver_version` says it, from which on graphs hold such launches."""

# Triton has names for these two instructions, which do not compile in 3.4.


@triton.jit
def after_last(early: tl.constexpr) -> None:
    """From here on all launches before this one have ended, and what they wrote is seen."""
    if early:
        tl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], tl.int32, is_pure=False, pack=1)


@triton.jit
def let_next_begin(early: tl.constexpr) -> None:
    """The launch after this one may begin, as soon as all programs of this one have come here or have ended."""
    if early:
        tl.inline_asm_elementwise("griddepcontrol.launch_dependents; // $0", "=r", [], tl.int32, is_pure=False, pack=1)


def driver_version() -> int:
    """The newest CUDA that NVIDIA's driver here knows, 12030 for 12.3; 0 where there is no driver."""
    version = ctypes.c_int(0)
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except OSError:
        return 0
    return version.value


@cache
def dependent(device: torch.device) -> dict[str, Any]:
    """Options of a launch whose kernel calls `after_last(early)`."""
    if device.type == "cpu" or torch.version.hip or torch.cuda.get_device_capability(device)[0] != 9:
        return {"early": False}
    return {"early": True, "launch_pdl": True} if driver_version() >= _GRAPHS_HOLD_THEM else {"early": False}
