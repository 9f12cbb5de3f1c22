"""Feed-forward layers that are a choice of experts: how mcore builds them, and what stands in for its GPU kernels."""
