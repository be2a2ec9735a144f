"""Many merged models together: which share a base, and stores that hold them once."""
