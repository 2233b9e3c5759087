"""Operations on one token at a time: RMSNorm, SwiGLU, the short convolution; in torch, Numba and Triton."""

from lattice_serve.kernels.pointwise.reference import l2_normalize, rms_norm, short_conv, swiglu

__all__ = ["l2_normalize", "rms_norm", "short_conv", "swiglu"]
