"""Evaluation: benchmarks measured with confidence intervals, compared in pairs, and validation during training."""

"""Evaluation: benchmarks measured with confidence intervals, compared in pairs, and validation during training."""
