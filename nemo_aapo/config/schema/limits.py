"""The greatest sane values that settings share: far above what anybody wants, below what harms or overflows."""

from __future__ import annotations

SECONDS = 31_536_000
"""A year; clocks of collectives, sockets and Slurm overflow some way above it."""
STEPS = 1_000_000_000
TOKENS = 1_000_000_000
BYTES = 2**40
COMPLETIONS = 65_536
"""Completions of one prompt."""
COMPLETIONS_OF_STEP = 10_000_000
"""Completions of one training step; Python holds each as an object."""
NODES = 100_000
"""Nodes, servers, and ranks of a whole job."""
RANKS_OF_NODE = 1024
SEED = 2**63 - 1
"""What a 64-bit counter-based generator takes."""
NUMBER = 1e30
"""float32, in which the learner computes, holds no more than 3e38."""
