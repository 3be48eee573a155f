"""Links in the making: which peers this daemon is dialing or awaits a second socket of, and the moment a link stands.

What dialing (`helixd.wire.dialing`) and listening (`helixd.wire.listening`) have in common. When two daemons dial each
other at the same time, each side's list here tells the other half about it.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from helixd import logs
from helixd.ids import PeerId
from helixd.tls import PeerTls
from helixd.wire.channel import Channel
from helixd.wire.errors import CloseCode
from helixd.wire.handshake import HandshakeFailed, Purpose
from helixd.wire.options import KIB, WireOptions
from helixd.wire.peers import PeerIdentity
from helixd.wire.registry import LinkRegistry
from helixd.wire.setup import Grant, own_grant
from helixd.wire.stream import MessageStream
from helixd.wire.websocket import WebSocketLink

PEER_PATH = "/peer"
# What is read before it is known where it belongs: several small frames, or the little that precedes a chunk.
_CONTROL_READ_AHEAD_BYTES = 64 * KIB
_BULK_READ_AHEAD_BYTES = 16 * KIB

logger = logging.getLogger(__name__)

Spawn = Callable[[Coroutine[Any, Any, None], str], asyncio.Task[None]]


@dataclass(slots=True, eq=False)
class Incoming:
    """A link whose control socket is authenticated and whose bulk socket is awaited."""

    identity: PeerIdentity
    bulk: asyncio.Future[tuple[Channel, MessageStream]]
    ended: asyncio.Event = field(default_factory=asyncio.Event)


class Meetings:
    """One daemon's unfinished links. `dialing`: instance by peer. `incoming`: by the token that its sockets share."""

    def __init__(
        self, identity: PeerIdentity, options: WireOptions, tls: PeerTls | None, registry: LinkRegistry, spawn: Spawn
    ) -> None:
        self.identity = identity
        self.options = options
        self.tls = tls
        self.registry = registry
        self.dialing: dict[PeerId, bytes] = {}
        self.incoming: dict[bytes, Incoming] = {}
        self._spawn = spawn

    def being_linked(self, them: PeerIdentity) -> bool:
        """Whether a link to exactly this process stands or is under way."""
        return (
            self.registry.same_process(them) is not None
            or self.dialing.get(them.peer) == them.instance
            or any(incoming.identity.instance == them.instance for incoming in self.incoming.values())
        )

    def check_certificate(self, channel: Channel, them: PeerIdentity) -> None:
        """Raises HandshakeFailed if the peer's certificate does not speak for the name it gives."""
        if self.tls is not None and them.peer not in channel.certified_names:
            names = ", ".join(sorted(channel.certified_names)) or "nobody"
            raise HandshakeFailed(CloseCode.AUTH_REJECTED, f"{them.peer} shows a certificate of {names}")

    def take_over(self, channel: Channel, purpose: Purpose) -> MessageStream:
        """The channel's messages from here on, past aiohttp."""
        bulk = purpose is Purpose.BULK
        read_ahead_bytes = _BULK_READ_AHEAD_BYTES if bulk else _CONTROL_READ_AHEAD_BYTES
        return channel.take_over(self.options.max_message_bytes, read_ahead_bytes, places=bulk)

    def stand(
        self,
        them: PeerIdentity,
        control: Channel,
        control_stream: MessageStream,
        bulk: Channel,
        bulk_stream: MessageStream,
        grant: Grant,
    ) -> WebSocketLink:
        """Called from the loop when the peer's grant came; nothing intervenes until the link is registered."""
        self.registry.judge(them, incoming=False)
        if not control.dialed:
            control_stream.write(own_grant(self.options).encode())
        link = WebSocketLink(
            them,
            control_stream,
            bulk_stream,
            control.remote_host,
            grant,
            self.options,
            self._spawn,
            self.registry.removed,
            partial(_release, control, bulk),
        )
        self.registry.add(link)
        logs.event(
            logger, logging.INFO, "link_up", peer=them.peer, incarnation=them.incarnation, host=link.remote_host
        )  # fmt: skip
        return link


async def _release(control: Channel, bulk: Channel) -> None:
    await control.release()
    await bulk.release()
