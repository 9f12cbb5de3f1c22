"""Measuring policies: drawing and judging, the estimators, validation in training, benchmarks, comparisons."""
