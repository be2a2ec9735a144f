"""What LoRA adapters leak: ``python -m benchmarks.leak``."""
