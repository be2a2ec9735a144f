"""Benchmarks: real models and adapters, and the commands that measure jdetune on them."""
