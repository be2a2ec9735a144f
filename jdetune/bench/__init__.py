"""LoWRA Bench: the paper's benchmark, its protocol and its baselines."""
