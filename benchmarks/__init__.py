"""Benchmarks, one question a file: `python -m benchmarks` in the tree, `aloud bench` once installed."""
