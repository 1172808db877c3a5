"""Benchmarks: checked first, then timed against baselines in the same run."""
