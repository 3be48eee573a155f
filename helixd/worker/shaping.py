"""Links slower than the sockets that carry them: a seam through which a worker's messages may be held back.

Only emulated workers use it; without it messages leave and arrive as the sockets let them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from helixd.ids import NodeId


@dataclass(frozen=True, slots=True)
class LinkFigures:
    """What a probe of a link would find."""

    rtt_s: float
    bandwidth_bytes_per_s: float


class Shaping(Protocol):
    """Delays that keep each link's order, urgent messages and others each among themselves.

    `node` is the other end, None for the coordinator.
    """

    def outward(self, node: NodeId | None, size_bytes: int, send: Callable[[], None], *, urgent: bool = False) -> None:
        """Call `send` once a message of that size has crossed the link to `node`, urgent ones ahead of others."""
        ...

    def inward(self, size_bytes: int, handle: Callable[[], None]) -> None:
        """Call `handle` once a message of that size has crossed the link from the coordinator."""
        ...

    def congested(self, node: NodeId | None) -> bool:
        """Whether more waits for the link to `node` than should."""
        ...

    def figures(self, node: NodeId | None) -> LinkFigures | None:
        """What the link to `node` does; None if there is none."""
        ...
