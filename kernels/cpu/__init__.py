"""What the CPU kernels are made of: vectors of 16 floats, tiles of products, and a team of threads."""
