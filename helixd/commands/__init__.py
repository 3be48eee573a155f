"""Subcommands of `helixd` that need no daemon: each a module with `main(argv)` that returns an exit status."""
