"""Attention within a row of sequences whose prompts may be shared: spans, kernels, and how their parts are merged."""
