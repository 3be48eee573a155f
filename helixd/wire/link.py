"""The seam between daemons: what a link to one peer offers, whatever carries it.

`helixd.wire.websocket` carries it over two aiohttp websockets, `helixd.wire.memory` inside one process (embedded
worker, several nodes of one daemon, and tests with latency, loss and kill). A link knows frames, never requests.

Order: frames of one class (small, or bulk) to one peer arrive in the order sent; small and bulk overtake each other.
"""

from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from helixd.ids import Incarnation, PeerId


class Frame(NamedTuple):
    """One message. `body` is msgpack-able builtins (ints, floats, str, bytes, bool, None, lists, no tensors).

    `payload` are raw bytes beside it (activations, weights): any C-contiguous buffer when sending, cast to bytes
    ("B"); owned, writable and stable memory when received. It must not be changed by the sender until `send` returns.
    """

    kind: int
    body: object
    payload: memoryview | None = None


@dataclass(frozen=True, slots=True)
class LinkMeasurement:
    """One probe of a link from this daemon to the peer, over the sockets that carry activations."""

    rtt_s: float
    bandwidth_bytes_per_s: float
    bytes_sent: int


class Link(Protocol):
    """One authenticated connection to one incarnation of a peer."""

    @property
    def peer(self) -> PeerId:
        """Who is at the other end."""
        ...

    @property
    def incarnation(self) -> Incarnation:
        """Which life of the peer this link speaks to."""
        ...

    @property
    def rtt_s(self) -> float | None:
        """Smoothed round trip of the liveness pings; None before the first answer."""
        ...

    @property
    def remote_host(self) -> str:
        """The peer's address as seen from here ("" in memory)."""
        ...

    @property
    def closed(self) -> str | None:
        """Why the link is closed; None while it is open."""
        ...

    async def send(self, frame: Frame) -> None:
        """Hand `frame` to the peer, waiting for credits and buffers as needed.

        Small frames go over the control socket, frames with a large payload over the bulk socket in chunks. When it
        returns, the payload's memory may be reused. Raises PeerLost when the link is or becomes closed, or when the
        peer takes nothing for the configured send deadline.
        """
        ...

    async def probe(self, max_bytes: int, timeout_s: float) -> LinkMeasurement:
        """Measure round trip and bandwidth from here to the peer with at most `max_bytes`. Raises PeerLost."""
        ...

    async def close(self, reason: str) -> None:
        """Close both directions. Idempotent. The peer sees PeerLost with the reason where it can be told."""
        ...


FrameHandler = Callable[[Link, Frame], Coroutine[Any, Any, None]]
"""Called for each received frame, one at a time per class, in order. Credits return to the sender when it returns, so a
slow handler is back-pressure. An exception it raises closes the link and is logged with the frame's kind."""

LinkLostHandler = Callable[[Link, str], None]
"""Called exactly once per link when it closes, with the reason. Must not block."""
