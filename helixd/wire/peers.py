"""What a daemon is on the wire, and what every carrier of links offers: websockets and memory alike.

The worker and the coordinator are written against `PeerNetwork`; which carrier is behind it they do not know.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from helixd.ids import Incarnation, PeerId
from helixd.wire.counters import LinkCounters
from helixd.wire.link import FrameHandler, Link

MAX_PEER_ID_BYTES = 200
INSTANCE_BYTES = 16


def _new_instance() -> bytes:
    return os.urandom(INSTANCE_BYTES)


@dataclass(frozen=True, slots=True)
class PeerIdentity:
    """One life of one daemon. `instance` tells two processes apart that claim the same peer and incarnation.

    Raises ValueError for a name that is empty, unprintable or longer than 200 bytes of UTF-8.
    """

    peer: PeerId
    incarnation: Incarnation
    instance: bytes = field(default_factory=_new_instance, repr=False)

    def __post_init__(self) -> None:
        if not self.peer or not self.peer.isprintable() or len(self.peer.encode()) > MAX_PEER_ID_BYTES:
            raise ValueError(f"a peer id must be 1..{MAX_PEER_ID_BYTES} printable bytes, not {self.peer[:80]!r}")
        if not 0 <= self.incarnation < 2**63:
            raise ValueError(f"incarnation {self.incarnation} of {self.peer} must be in 0..2**63-1")
        if len(self.instance) != INSTANCE_BYTES:
            raise ValueError(f"an instance is {INSTANCE_BYTES} bytes, not {len(self.instance)}")


AcceptPeer = Callable[[PeerId, Incarnation], str | None]
"""Asked once per incoming link after authentication: None to accept, else the reason to refuse, told to the peer."""

LinkUp = Callable[[Link], FrameHandler]
"""Called when a link stands, before any of its frames is delivered; returns what handles them. Must not block."""


class PeerNetwork(Protocol):
    """One daemon's place among its peers. At most one open link per peer."""

    @property
    def identity(self) -> PeerIdentity:
        """Who we are."""
        ...

    @property
    def links(self) -> Mapping[PeerId, Link]:
        """The open links: a live, read-only view."""
        ...

    @property
    def counters(self) -> Mapping[PeerId, LinkCounters]:
        """A snapshot of what each open link carried so far."""
        ...

    async def listen(self, host: str, port: int) -> tuple[str, int]:
        """Accept peers at `host:port` (port 0: any free one); returns the address bound."""
        ...

    async def dial(self, host: str, port: int, timeout_s: float, expect: PeerId | None = None) -> Link:
        """A link to whoever listens there; the existing one if it stands.

        Raises PeerLost (nobody, or no answer in time: try again later), AuthRejected, VersionMismatch, or PeerRefused
        (also when another peer than `expect` answers).
        """
        ...

    async def close(self) -> None:
        """Close every link and stop listening. Idempotent."""
        ...
