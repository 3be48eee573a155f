"""Faults of networks, for tests only: nothing in the daemons knows of them, no message can ask for them."""
