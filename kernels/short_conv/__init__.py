"""Causal depthwise convolution of a few taps, with the inputs it has to remember."""

from lattice_serve.kernels.short_conv.reference import short_conv

__all__ = ["short_conv"]
