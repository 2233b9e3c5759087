"""What CPU kernels are made of, in Numba: vectors of 16 floats, products, the matrix unit, and a team of threads."""
