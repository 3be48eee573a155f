"""How much a property test may cost: a CI run's share, or all of it with `--long`."""

import os

# Set by tests/conftest.py; the processes that share the work inherit it.
LONG = "HELIXD_TESTS_LONG" in os.environ


def examples(ci: int, long: int) -> int:
    """How many examples to try."""
    return long if LONG else ci
