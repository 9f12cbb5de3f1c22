"""What stands in for CUDA where there is none: layers and kernels in plain torch, and patched functions."""
