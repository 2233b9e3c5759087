"""SwiGLU: ``silu(gate) * up``."""

from lattice_serve.kernels.swiglu.reference import swiglu

__all__ = ["swiglu"]
