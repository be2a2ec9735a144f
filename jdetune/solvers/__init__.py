"""Solvers: one algorithm a file, a frozen dataclass of hyperparameters each."""
