"""RMSNorm: ``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension."""

from lattice_serve.kernels.norm.reference import l2_normalize, rms_norm

__all__ = ["l2_normalize", "rms_norm"]
