"""One daemon's peer port: listens, dials, authenticates, and keeps at most one websocket link per peer.

When two daemons dial each other at the same time, the dial of the smaller peer id stands and the other one yields; both
`dial` calls return the one link. Redialing after a loss is the caller's business.
"""

import asyncio
import logging
import os
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any, Self

import aiohttp
from aiohttp import web

from helixd import logs
from helixd.errors import HelixError, PeerLost
from helixd.ids import PeerId
from helixd.tls import PeerTls
from helixd.wire.channel import Channel, PeerClientWebSocket
from helixd.wire.counters import LinkCounters
from helixd.wire.errors import AuthRejected, CloseCode, FrameError, PeerRefused, VersionMismatch
from helixd.wire.handshake import (
    TOKEN_BYTES,
    DialerHandshake,
    HandshakeFailed,
    Hello,
    ListenerHandshake,
    Purpose,
    new_hello,
)
from helixd.wire.link import Link, LinkLostHandler
from helixd.wire.opening import LinkOpening
from helixd.wire.options import KIB, WireOptions
from helixd.wire.peers import AcceptPeer, LinkUp, PeerIdentity
from helixd.wire.registry import LinkRegistry
from helixd.wire.server import GuardedHandler, PeerServer
from helixd.wire.setup import Grant, own_grant
from helixd.wire.sockets import tune_socket
from helixd.wire.stream import MessageStream
from helixd.wire.websocket import WebSocketLink

PEER_PATH = "/peer"
_COMPLAINT_PERIOD_S = 60.0
_MAX_COMPLAINTS = 1024
# What is read before it is known where it belongs: several small frames, or the little that precedes a chunk.
_CONTROL_READ_AHEAD_BYTES = 64 * KIB
_BULK_READ_AHEAD_BYTES = 16 * KIB

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Incoming:
    """A link whose control socket is authenticated and whose bulk socket is awaited."""

    identity: PeerIdentity
    bulk: asyncio.Future[tuple[Channel, MessageStream]]
    ended: asyncio.Event = field(default_factory=asyncio.Event)


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
        self._secret = secret
        self._tls = tls
        self._registry = LinkRegistry(identity, accept, on_link, on_lost)
        self._tasks = asyncio.TaskGroup()
        self._session: aiohttp.ClientSession | None = None
        self._server: PeerServer | None = None
        self._listeners: list[asyncio.Server] = []
        self._dialing: dict[PeerId, bytes] = {}
        self._incoming: dict[bytes, _Incoming] = {}
        self._complaints: dict[str, float] = {}

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
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None),
            ws_response_class=PeerClientWebSocket,
        )
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
        if self._server is None:
            self._server = PeerServer(self._serve, self._options)
        listener = await asyncio.get_running_loop().create_server(
            self._server, host, port,
            ssl=None if self._tls is None else self._tls.server,
            ssl_handshake_timeout=None if self._tls is None else self._options.auth_timeout_s,
        )  # fmt: skip
        self._listeners.append(listener)
        bound = listener.sockets[0].getsockname()
        return str(bound[0]), int(bound[1])

    async def dial(self, host: str, port: int, timeout_s: float, expect: PeerId | None = None) -> Link:
        """See `PeerNetwork.dial`."""
        if expect is not None and expect in self.links:
            return self.links[expect]
        where = f"{expect} ({host}:{port})" if expect is not None else f"{host}:{port}"
        try:
            async with asyncio.timeout(timeout_s):
                return await self._dial(host, port, expect, where)
        except TimeoutError as error:
            raise PeerLost(where, f"no link within {timeout_s} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise PeerLost(where, f"cannot connect: {error}") from error
        except FrameError as error:
            raise PeerLost(where, f"spoke nonsense: {error}") from error

    async def close(self) -> None:
        """Close every link and stop listening. Idempotent."""
        for listener in self._listeners:
            listener.close()
        await self._registry.close(f"{self._identity.peer} is closing")
        if self._server is not None:
            for incoming in self._incoming.values():
                incoming.bulk.cancel()
            await self._server.shutdown(self._options.close_timeout_s)
        if self._session is not None:
            await self._session.close()

    async def _open(self, host: str, port: int, bulk: bool) -> Channel:
        if self._session is None or self._session.closed:
            raise PeerLost(f"{host}:{port}", "this daemon's peer endpoint is not open")
        ws = await self._session.ws_connect(
            f"{'http' if self._tls is None else 'https'}://{f'[{host}]' if ':' in host else host}:{port}{PEER_PATH}",
            ssl=True if self._tls is None else self._tls.client,
            autoping=False,
            autoclose=False,
            heartbeat=None,
            compress=0,
            max_msg_size=self._options.max_message_bytes + 1,
            timeout=aiohttp.ClientWSTimeout(ws_receive=None, ws_close=self._options.close_timeout_s),
        )
        if not isinstance(ws, PeerClientWebSocket):
            raise TypeError(f"the client session made a {type(ws).__name__}")
        tune_socket(ws.get_extra_info("socket"), self._options, bulk)
        return Channel(ws, ws.transport, dialed=True)

    async def _dial(self, host: str, port: int, expect: PeerId | None, where: str) -> Link:
        channels: list[Channel] = []
        them: PeerIdentity | None = None
        try:
            token = os.urandom(TOKEN_BYTES)
            channels.append(control := await self._open(host, port, bulk=False))
            shake = DialerHandshake(control.ws, new_hello(self._identity, Purpose.CONTROL, token), self._secret, where)
            them = (await shake.greet()).identity
            self._check_certificate(control, them)
            if expect is not None and them.peer != expect:
                raise HandshakeFailed(CloseCode.REFUSED, f"expected {expect}, {them.peer} answers")
            if self._being_linked(them):
                await control.hang_up(CloseCode.YIELDED, "already linked")
                return await self._registry.arrival(them)
            self._registry.judge(them, incoming=False)
            self._dialing[them.peer] = them.instance
            try:
                await shake.prove()
                control_stream = self._take_over(control, Purpose.CONTROL)
                channels.append(bulk := await self._open(host, port, bulk=True))
                shake = DialerHandshake(bulk.ws, new_hello(self._identity, Purpose.BULK, token), self._secret, where)
                if (await shake.greet()).identity != them:
                    raise HandshakeFailed(CloseCode.REFUSED, f"{them.peer} changed while it was dialed")
                self._check_certificate(bulk, them)
                await shake.prove()
                bulk_stream = self._take_over(bulk, Purpose.BULK)
                stand = partial(self._stand, them, control, control_stream, bulk, bulk_stream)
                link = await LinkOpening(control_stream, bulk_stream, True, self._options, where, stand).run()
            finally:
                del self._dialing[them.peer]
            channels.clear()
            return link
        except PeerRefused as refusal:
            if refusal.code != CloseCode.YIELDED or them is None:
                raise
            return await self._registry.arrival(them)
        except HandshakeFailed as failure:
            for channel in channels:
                await channel.hang_up(failure.code, failure.reason)
            raise _our_refusal(where, failure) from failure
        finally:
            for channel in channels:
                channel.abort()
                await channel.release()

    def _being_linked(self, them: PeerIdentity) -> bool:
        return (
            self._registry.same_process(them) is not None
            or self._dialing.get(them.peer) == them.instance
            or any(incoming.identity.instance == them.instance for incoming in self._incoming.values())
        )

    def _check_certificate(self, channel: Channel, them: PeerIdentity) -> None:
        if self._tls is not None and them.peer not in channel.certified_names:
            names = ", ".join(sorted(channel.certified_names)) or "nobody"
            raise HandshakeFailed(CloseCode.AUTH_REJECTED, f"{them.peer} shows a certificate of {names}")

    def _take_over(self, channel: Channel, purpose: Purpose) -> MessageStream:
        bulk = purpose is Purpose.BULK
        read_ahead_bytes = _BULK_READ_AHEAD_BYTES if bulk else _CONTROL_READ_AHEAD_BYTES
        return channel.take_over(self._options.max_message_bytes, read_ahead_bytes, places=bulk)

    def _stand(
        self,
        them: PeerIdentity,
        control: Channel,
        control_stream: MessageStream,
        bulk: Channel,
        bulk_stream: MessageStream,
        grant: Grant,
    ) -> WebSocketLink:
        """Called from the loop when the peer's grant came; nothing intervenes until the link is registered."""
        self._registry.judge(them, incoming=False)
        if not control.dialed:
            control_stream.write(own_grant(self._options).encode())
        link = WebSocketLink(
            them,
            control_stream,
            bulk_stream,
            control.remote_host,
            grant,
            self._options,
            self.spawn,
            self._registry.removed,
            partial(_release, control, bulk),
        )
        self._registry.add(link)
        logs.event(
            logger, logging.INFO, "link_up", peer=them.peer, incarnation=them.incarnation, host=link.remote_host
        )  # fmt: skip
        return link

    async def _serve(self, request: web.BaseRequest) -> web.StreamResponse:
        guard = request.protocol
        if request.path != PEER_PATH or not isinstance(guard, GuardedHandler):
            return web.Response(status=404, text="this is the peer port of a helixd daemon\n")
        options = self._options
        ws = web.WebSocketResponse(
            timeout=options.close_timeout_s,
            autoping=False,
            autoclose=False,
            heartbeat=None,
            compress=False,
            max_msg_size=options.max_message_bytes + 1,
        )
        if not ws.can_prepare(request):
            return web.Response(status=426, text="websocket only\n", headers={"Upgrade": "websocket"})
        await ws.prepare(request)
        channel = Channel(ws, request.transport, dialed=False)
        where = channel.remote_host
        try:
            shake = ListenerHandshake(ws, self._identity, self._secret, where)
            async with asyncio.timeout_at(guard.deadline_s):
                hello = await shake.challenge()
            self._check_certificate(channel, hello.identity)
            tune_socket(ws.get_extra_info("socket"), options, hello.purpose is Purpose.BULK)
            serve = self._serve_bulk if hello.purpose is Purpose.BULK else self._serve_control
            await serve(channel, hello, shake, guard.admit)
        except TimeoutError:
            await channel.hang_up(CloseCode.AUTH_TIMEOUT, "authentication took too long")
        except HandshakeFailed as failure:
            self._complain(where, failure.reason)
            await channel.hang_up(failure.code, failure.reason)
        except (HelixError, ConnectionError) as error:
            self._complain(where, str(error))
            channel.abort()
        return ws

    async def _serve_control(
        self, control: Channel, hello: Hello, shake: ListenerHandshake, admit: Callable[[], None]
    ) -> None:
        them, token = hello.identity, hello.token
        self._registry.judge(them, incoming=True)
        if self._dialing.get(them.peer) == them.instance and self._identity.peer < them.peer:
            raise HandshakeFailed(CloseCode.YIELDED, "both sides dialed, this dial yields")
        if token in self._incoming:
            raise HandshakeFailed(CloseCode.REFUSED, "a link token is used once")
        admit()
        incoming = _Incoming(them, asyncio.get_running_loop().create_future())
        self._incoming[token] = incoming
        try:
            control_stream = self._take_over(control, Purpose.CONTROL)
            try:
                async with asyncio.timeout(self._options.auth_timeout_s):
                    await shake.welcome()
                    bulk, bulk_stream = await incoming.bulk
                stand = partial(self._stand, them, control, control_stream, bulk, bulk_stream)
                opening = LinkOpening(control_stream, bulk_stream, False, self._options, them.peer, stand)
                link = await opening.run()
            finally:
                del self._incoming[token]
            await link.wait_closed()
        finally:
            incoming.ended.set()

    async def _serve_bulk(
        self, bulk: Channel, hello: Hello, shake: ListenerHandshake, admit: Callable[[], None]
    ) -> None:
        incoming = self._incoming.get(hello.token)
        if incoming is None or incoming.identity != hello.identity or incoming.bulk.done():
            raise HandshakeFailed(CloseCode.REFUSED, "a bulk socket without its control socket")
        admit()
        stream = self._take_over(bulk, Purpose.BULK)
        await shake.welcome()
        if not incoming.bulk.done():
            incoming.bulk.set_result((bulk, stream))
        # aiohttp closes the websocket when its handler returns.
        await incoming.ended.wait()

    def _complain(self, where: str, reason: str) -> None:
        """One log line per source and minute."""
        now_s = asyncio.get_running_loop().time()
        if now_s - self._complaints.get(where, float("-inf")) < _COMPLAINT_PERIOD_S:
            return
        if len(self._complaints) >= _MAX_COMPLAINTS:
            self._complaints.clear()
        self._complaints[where] = now_s
        logs.event(logger, logging.WARNING, "peer_refused", host=where, reason=reason)


async def _release(control: Channel, bulk: Channel) -> None:
    await control.release()
    await bulk.release()


def _our_refusal(where: str, failure: HandshakeFailed) -> Exception:
    """What a dialer raises when it is itself who ends the handshake."""
    if failure.code is CloseCode.AUTH_REJECTED:
        return AuthRejected(where, failure.reason)
    if failure.code is CloseCode.VERSION_MISMATCH:
        return VersionMismatch(f"{where}: {failure.reason}")
    if failure.code is CloseCode.BAD_HELLO:
        return PeerLost(where, failure.reason)
    return PeerRefused(where, failure.code, failure.reason)
