"""Many merged models at once: which belong together, and keeping them in less space."""
