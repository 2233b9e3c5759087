"""The operations of the models, each as a torch reference, in Numba for CPUs and in Triton for GPUs.

    mixers/      what reads and writes a sequence's state, a folder for each model family (`lattice`); `base` says what
                 a family gives, `segments` which tokens of a batch belong to which state row
    decoder/     a step of the whole network, from token ids to logits: `cpu` and `triton`
    linear/      matrix products whose rows have the same bits at any number of rows; float32, bfloat16, int8
    pointwise/   RMSNorm, SwiGLU, the short convolution
    sampling     tokens drawn from logits on the CPU
    numba/       what CPU kernels are made of: vectors of 16 floats, dot products, AMX, VNNI, the team of threads
    triton/      what GPU kernels share: dependent launches, CUDA graphs, uploads

A module is named for its operation; `reference` is torch, `cpu` Numba, `triton` Triton.
"""

from lattice_serve.kernels.numba.cache import configure_cache
from lattice_serve.kernels.pointwise import rms_norm, swiglu

configure_cache()

__all__ = ["rms_norm", "swiglu"]
