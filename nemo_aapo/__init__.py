"""AAPO (Advantage-Augmented Policy Optimization, arXiv 2505.14264) for Megatron policies."""

__version__ = "0.1.0"
