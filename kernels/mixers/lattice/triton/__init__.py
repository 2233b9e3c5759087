"""The Lattice mixer on GPUs, in Triton."""
