"""SwiGLU on GPUs; reference: `swiglu.reference`.

    gate_up [M, 2 n], the gate first, out [M, n]: float32 or bfloat16, computed in float32

Bound by memory: three elements moved for each one written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit
def _swiglu(p_gate_up: tl.tensor, p_out: tl.tensor, n: tl.constexpr, b_n: tl.constexpr) -> None:
    i_row = tl.program_id(0).to(tl.int64)
    o_n = tl.program_id(1) * b_n + tl.arange(0, b_n)
    inside = o_n < n
    p_gate = p_gate_up + i_row * 2 * n + o_n
    gate = tl.load(p_gate, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(p_gate + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(p_out + i_row * n + o_n, gate * tl.sigmoid(gate) * up, mask=inside)


def swiglu(gate_up: Tensor, out: Tensor) -> Tensor:
    """``silu(gate) * up`` of gate_up [M, 2 n] into `out` [M, n], which is returned.

    Raises ValueError when shapes or dtypes do not fit.
    """
    M, n = out.shape
    if gate_up.shape != (M, 2 * n) or gate_up.dtype != out.dtype or gate_up.device != out.device:
        raise ValueError(f"gate_up must be {out.dtype} [{M}, {2 * n}] on {out.device}, not {[*gate_up.shape]}")
    if out.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"out must be float32 or bfloat16, not {out.dtype}")
    if not (gate_up.is_contiguous() and out.is_contiguous()):
        raise ValueError("gate_up and out must be contiguous")
    if M:
        b_n = min(_BLOCK, triton.next_power_of_2(n))
        num_warps = 2 if torch.version.hip else 4  # of 64 lanes there: 16 bytes of bfloat16 each
        _swiglu[(M, triton.cdiv(n, b_n))](gate_up, out, n=n, b_n=b_n, num_warps=num_warps)
    return out
