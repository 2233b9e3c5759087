"""What GPU kernels share: dependent launches, CUDA graphs, and uploads from host memory."""
