"""SwiGLU on any device, differentiable."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import silu


def swiglu(gate_up: Tensor) -> Tensor:
    """gate_up [..., 2 n], the gate first -> ``silu(gate) * up`` [..., n].

    Source: Shazeer, arXiv 2002.05202, equation 6.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    return silu(gate) * up
