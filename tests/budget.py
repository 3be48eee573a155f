"""How much a property test may cost: a CI run's share, or all of it with `--long`."""

import sys

LONG = "--long" in sys.argv


def examples(ci: int, long: int) -> int:
    """How many examples to try."""
    return long if LONG else ci
