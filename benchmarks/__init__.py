"""Measurements behind the README; each module runs as `python -m benchmarks.<name>`."""
