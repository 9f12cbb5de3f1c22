"""Triton kernels of decoding and sampling, for GPUs."""
