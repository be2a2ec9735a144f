"""Experiments with `jdetune.watch`: ``python -m benchmarks.watch --experiment=NAME``."""

#: Modules; each has its section, and markers for its tables, in docs/watch.md.
EXPERIMENTS = ("unlearning", "backdoors", "real", "chat", "audit", "recovered", "evasion")
