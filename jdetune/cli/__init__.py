"""The ``jdetune`` program: one file a subcommand, ``main`` dispatches."""
