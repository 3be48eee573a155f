"""Which versions of the messages this daemon speaks, and from which on a peer understands what."""

PROTOCOL_VERSION = 2
OLDEST_VERSION = 1
"""Versions this daemon speaks, both inclusive: its own and the one before. Version 2 compares the weights."""
RELAY_VERSION = 2
"""From this version on a worker understands that the coordinator carries its rows."""
MEASURE_VERSION = 2
"""From this version on a worker measures a node again when it is asked to."""


def common_version(newest: int, oldest: int) -> int | None:
    """The newest version that we and a peer speaking `oldest` to `newest` have in common; None for none."""
    version = min(newest, PROTOCOL_VERSION)
    return version if version >= max(oldest, OLDEST_VERSION) else None
