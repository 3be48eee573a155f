"""One daemon's peer port: listens, dials, authenticates, and keeps at most one websocket link per peer.

When two daemons dial each other at the same time, the dial of the smaller peer id stands and the other one yields; both
`dial` calls return the one link. Redialing after a loss is the caller's business.
"""

import asyncio
from collections.abc import Coroutine, Mapping
from types import TracebackType
from typing import Any, Self

import aiohttp

from helixd.errors import PeerLost
from helixd.ids import PeerId
from helixd.tls import PeerTls
from helixd.wire.counters import LinkCounters
from helixd.wire.dialing import Dialer
from helixd.wire.errors import FrameError
from helixd.wire.link import Link, LinkLostHandler
from helixd.wire.listening import Reception
from helixd.wire.meeting import Meetings
from helixd.wire.options import WireOptions
from helixd.wire.peers import AcceptPeer, LinkUp, PeerIdentity
from helixd.wire.registry import LinkRegistry


class Endpoint:
    """A `PeerNetwork` over websockets. An async context manager; every task it starts ends with it.

    `secret` None means an empty key: whoever reaches the port (and has a certificate, with `tls`) gets in, so the
    caller must have decided that this is wanted. `tls`: every link is encrypted, and a peer is who its certificate
    speaks for. `accept` is asked about incoming peers after they have proven the secret.
    """

    def __init__(
        self,
        identity: PeerIdentity,
        options: WireOptions,
        secret: bytes | None,
        accept: AcceptPeer,
        on_link: LinkUp,
        on_lost: LinkLostHandler,
        tls: PeerTls | None = None,
    ) -> None:
        self._identity = identity
        self._options = options
        self._registry = LinkRegistry(identity, accept, on_link, on_lost)
        self._tasks = asyncio.TaskGroup()
        meetings = Meetings(identity, options, tls, self._registry, self.spawn)
        self._dialer = Dialer(meetings, secret)
        self._reception = Reception(meetings, secret)

    @property
    def identity(self) -> PeerIdentity:
        """Who we are."""
        return self._identity

    @property
    def links(self) -> Mapping[PeerId, Link]:
        """The open links."""
        return self._registry.links

    @property
    def counters(self) -> Mapping[PeerId, LinkCounters]:
        """A snapshot of what each open link carried so far."""
        return self._registry.counters

    @property
    def options(self) -> WireOptions:
        """Windows, limits and timers."""
        return self._options

    @property
    def registry(self) -> LinkRegistry:
        """The owner of the links, for other carriers that join this daemon's links (`helixd.wire.memory`)."""
        return self._registry

    def spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Run `work` in this endpoint's task group."""
        return self._tasks.create_task(work, name=name)

    async def __aenter__(self) -> Self:
        await self._tasks.__aenter__()
        self._dialer.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self.close()
        finally:
            # Only a cancellation may be the group's own doing; the body's errors pass by it unwrapped.
            mine = (kind, error, trace) if isinstance(error, asyncio.CancelledError) else (None, None, None)
            await self._tasks.__aexit__(*mine)

    async def listen(self, host: str, port: int) -> tuple[str, int]:
        """Accept peers at `host:port`; port 0 takes any free one. Returns the address bound. Raises OSError."""
        return await self._reception.listen(host, port)

    async def dial(self, host: str, port: int, timeout_s: float, expect: PeerId | None = None) -> Link:
        """See `PeerNetwork.dial`."""
        if expect is not None and expect in self.links:
            return self.links[expect]
        where = f"{expect} ({host}:{port})" if expect is not None else f"{host}:{port}"
        try:
            async with asyncio.timeout(timeout_s):
                return await self._dialer.dial(host, port, expect, where)
        except TimeoutError as error:
            raise PeerLost(where, f"no link within {timeout_s} s") from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            # An address can be one that another daemon advertises: it may be no address at all.
            raise PeerLost(where, f"cannot connect: {error}") from error
        except FrameError as error:
            raise PeerLost(where, f"spoke nonsense: {error}") from error

    async def close(self) -> None:
        """Close every link and stop listening. Idempotent."""
        self._reception.stop_listening()
        await self._registry.close(f"{self._identity.peer} is closing")
        await self._reception.close()
        await self._dialer.close()
