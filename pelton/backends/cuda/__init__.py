"""NVIDIA GPUs: programs lowered to PyTorch and Triton kernels, decode steps replayed as CUDA graphs."""
