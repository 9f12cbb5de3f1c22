"""The measurements of scripts/benchmark.py: costs and ratios, by repeats that take turns."""
