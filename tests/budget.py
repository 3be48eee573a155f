"""How much a property test may cost: a CI run's share, or all of it with `--long`."""

import os

LONG_VARIABLE = "HELIXD_TESTS_LONG"  # set by tests/conftest.py, which the processes that share the work inherit
LONG = LONG_VARIABLE in os.environ


def examples(ci: int, long: int) -> int:
    """How many examples to try."""
    return long if LONG else ci
