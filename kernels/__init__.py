"""The operations of a Lattice model, each in every form: torch on any device, Numba on the CPU."""

from lattice_serve.kernels.compiled import mind_files
from lattice_serve.kernels.lattice import LatticeState, lattice_chunk, lattice_recurrent
from lattice_serve.kernels.norm import rms_norm
from lattice_serve.kernels.swiglu import swiglu

mind_files()

__all__ = ["LatticeState", "lattice_chunk", "lattice_recurrent", "rms_norm", "swiglu"]
