"""The Lattice mixer on the CPU, in Numba."""
