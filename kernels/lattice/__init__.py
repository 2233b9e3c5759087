"""The Lattice recurrence and its state."""

from lattice_serve.kernels.lattice.chunk import lattice_chunk
from lattice_serve.kernels.lattice.recurrent import lattice_recurrent
from lattice_serve.kernels.lattice.state import LatticeState

__all__ = ["LatticeState", "lattice_chunk", "lattice_recurrent"]
