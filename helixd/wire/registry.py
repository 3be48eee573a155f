"""Who is linked with whom: the mutable owner of one daemon's links, whatever carries them.

At most one open link per peer. A higher incarnation replaces a lower one, the same process replaces its own older
connection, and everybody else who claims a linked peer's name is refused: lower incarnations are ghosts, equal ones of
another process are clones.
"""

import asyncio
from collections.abc import Mapping
from types import MappingProxyType
from typing import Protocol

from helixd.errors import PeerLost
from helixd.ids import PeerId
from helixd.wire.counters import LinkCounters
from helixd.wire.errors import CloseCode
from helixd.wire.handshake import HandshakeFailed
from helixd.wire.link import FrameHandler, Link, LinkLostHandler
from helixd.wire.peers import AcceptPeer, LinkUp, PeerIdentity


class OwnedLink(Link, Protocol):
    """A link as its carrier sees it."""

    @property
    def identity(self) -> PeerIdentity:
        """The peer's identity, instance included."""
        ...

    @property
    def counters(self) -> LinkCounters:
        """What was carried so far."""
        ...

    def start(self, handler: FrameHandler) -> None:
        """Begin to deliver frames."""
        ...

    def fail(self, reason: str, told: str | None = None) -> None:
        """Close at once; `told` is passed on to the peer where given."""
        ...


class LinkRegistry:
    """One daemon's open links and the rules for adding to them."""

    def __init__(self, identity: PeerIdentity, accept: AcceptPeer, on_link: LinkUp, on_lost: LinkLostHandler) -> None:
        self.identity = identity
        self._accept = accept
        self._on_link = on_link
        self._on_lost = on_lost
        self._links: dict[PeerId, OwnedLink] = {}
        self._arrivals: dict[PeerId, asyncio.Future[Link]] = {}
        self._closing: str | None = None
        self.links: Mapping[PeerId, Link] = MappingProxyType(self._links)

    @property
    def counters(self) -> dict[PeerId, LinkCounters]:
        """A snapshot for every open link."""
        return {peer: link.counters for peer, link in self._links.items()}

    def judge(self, who: PeerIdentity, incoming: bool) -> None:
        """Raises HandshakeFailed if `who` may not be linked with us; asks `accept` about incoming peers."""
        if self._closing is not None:
            raise HandshakeFailed(CloseCode.NOT_NOW, f"{self.identity.peer} is closing")
        if who.instance == self.identity.instance:
            raise HandshakeFailed(CloseCode.REFUSED, f"{who.peer} dialed itself")
        if who.peer == self.identity.peer:
            raise HandshakeFailed(CloseCode.DUPLICATE, f"two daemons are named {who.peer}; give one another id")
        standing = self._links.get(who.peer)
        other_process = standing is not None and standing.identity.instance != who.instance
        if standing is not None and other_process and who.incarnation <= standing.incarnation:
            raise HandshakeFailed(
                CloseCode.DUPLICATE,
                f"{who.peer} is linked with incarnation {standing.incarnation}, {who.incarnation} is not newer",
            )
        if incoming:
            refusal = self._accept(who.peer, who.incarnation)
            if refusal is not None:
                raise HandshakeFailed(CloseCode.REFUSED, refusal)

    def same_process(self, who: PeerIdentity) -> Link | None:
        """The open link to exactly this process, if there is one."""
        standing = self._links.get(who.peer)
        return standing if standing is not None and standing.identity.instance == who.instance else None

    def add(self, link: OwnedLink) -> None:
        """Register and start `link`, replacing an older one to the same peer. Raises HandshakeFailed as `judge`."""
        self.judge(link.identity, incoming=False)
        standing = self._links.get(link.peer)
        if standing is not None:
            if standing.identity.instance == link.identity.instance:
                standing.fail("replaced by a newer connection of the same process")
            else:
                standing.fail(f"{link.peer} restarted: incarnation {standing.incarnation} -> {link.incarnation}")
        self._links[link.peer] = link
        link.start(self._on_link(link))
        arrival = self._arrivals.pop(link.peer, None)
        if arrival is not None and not arrival.done():
            arrival.set_result(link)

    def removed(self, link: OwnedLink, reason: str) -> None:
        """A registered link has closed."""
        if self._links.get(link.peer) is link:
            del self._links[link.peer]
        self._on_lost(link, reason)

    async def arrival(self, who: PeerIdentity) -> Link:
        """The link to `who` that is being made by another dial; the caller keeps the deadline."""
        standing = self.same_process(who)
        if standing is not None:
            return standing
        if who.peer not in self._arrivals:
            self._arrivals[who.peer] = asyncio.get_running_loop().create_future()
        return await asyncio.shield(self._arrivals[who.peer])

    async def close(self, reason: str) -> None:
        """Close every link and let no new one in. Idempotent."""
        self._closing = reason
        for arrival in self._arrivals.values():
            if not arrival.done():
                arrival.set_exception(PeerLost(self.identity.peer, f"this daemon is closing: {reason}"))
                arrival.exception()
        self._arrivals.clear()
        links = list(self._links.values())
        for link in links:
            link.fail(f"closed here: {reason}", told=reason)
        for link in links:
            await link.close(reason)
