"""What scripts/benchmark.py measures: ratios within one process, by interleaved repeats."""
