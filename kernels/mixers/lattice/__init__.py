"""The Lattice family's mixer: everything of a layer between its input and its output projection, as one operation.

shape, state, layout       dimensions and weights; the state as tensors; the state as one flat row
recurrent, chunk           the recurrence in torch: token by token (the oracle), and a chunk at a time
reference                  the whole mixer in torch
cpu/, triton/              the whole mixer in Numba and in Triton
"""

from lattice_serve.kernels.mixers.lattice.chunk import lattice_chunk
from lattice_serve.kernels.mixers.lattice.layout import StateLayout
from lattice_serve.kernels.mixers.lattice.recurrent import lattice_recurrent
from lattice_serve.kernels.mixers.lattice.reference import MixerState, mix
from lattice_serve.kernels.mixers.lattice.shape import MixerShape, MixerWeights
from lattice_serve.kernels.mixers.lattice.state import LatticeState

__all__ = [
    "LatticeState",
    "MixerShape",
    "MixerState",
    "MixerWeights",
    "StateLayout",
    "lattice_chunk",
    "lattice_recurrent",
    "mix",
]
