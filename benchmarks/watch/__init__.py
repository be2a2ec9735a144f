"""Experiments with `jdetune.watch`: ``python -m benchmarks.watch --experiment=NAME``."""
