"""Being dialed: the handler of the peer port's connections, from the upgrade to the end of their link.

A link's two sockets come as two connections with one token; the first waits for the second. Refusals are logged once
per source and minute.
"""

import asyncio
import logging
from collections.abc import Callable
from functools import partial

from aiohttp import web

from helixd import logs
from helixd.errors import HelixError
from helixd.wire.channel import Channel
from helixd.wire.errors import CloseCode
from helixd.wire.handshake import HandshakeFailed, Hello, ListenerHandshake, Purpose
from helixd.wire.meeting import PEER_PATH, Incoming, Meetings
from helixd.wire.opening import LinkOpening
from helixd.wire.server import GuardedHandler, PeerServer
from helixd.wire.sockets import tune_socket

_COMPLAINT_PERIOD_S = 60.0
_MAX_COMPLAINTS = 1024

logger = logging.getLogger(__name__)


class Reception:
    """Lets peers in. `listen` as often as there are addresses."""

    def __init__(self, meetings: Meetings, secret: bytes | None) -> None:
        self._meetings = meetings
        self._secret = secret
        self._server: PeerServer | None = None
        self._listeners: list[asyncio.Server] = []
        self._complaints: dict[str, float] = {}

    async def listen(self, host: str, port: int) -> tuple[str, int]:
        """Accept peers at `host:port`; port 0 takes any free one. Returns the address bound. Raises OSError."""
        options, tls = self._meetings.options, self._meetings.tls
        if self._server is None:
            self._server = PeerServer(self._serve, options)
        listener = await asyncio.get_running_loop().create_server(
            self._server, host, port,
            ssl=None if tls is None else tls.server,
            ssl_handshake_timeout=None if tls is None else options.auth_timeout_s,
        )  # fmt: skip
        self._listeners.append(listener)
        bound = listener.sockets[0].getsockname()
        return str(bound[0]), int(bound[1])

    def stop_listening(self) -> None:
        """Nobody new. Idempotent."""
        for listener in self._listeners:
            listener.close()

    async def close(self) -> None:
        """End the connections whose links never stood; those that did are closed before. Idempotent."""
        if self._server is not None:
            for incoming in self._meetings.incoming.values():
                incoming.bulk.cancel()
            await self._server.shutdown(self._meetings.options.close_timeout_s)

    async def _serve(self, request: web.BaseRequest) -> web.StreamResponse:
        guard = request.protocol
        if request.path != PEER_PATH or not isinstance(guard, GuardedHandler):
            return web.Response(status=404, text="this is the peer port of a helixd daemon\n")
        options = self._meetings.options
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
            shake = ListenerHandshake(ws, self._meetings.identity, self._secret, where)
            async with asyncio.timeout_at(guard.deadline_s):
                hello = await shake.challenge()
            self._meetings.check_certificate(channel, hello.identity)
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
        self._meetings.registry.judge(them, incoming=True)
        if self._meetings.dialing.get(them.peer) == them.instance and self._meetings.identity.peer < them.peer:
            raise HandshakeFailed(CloseCode.YIELDED, "both sides dialed, this dial yields")
        if token in self._meetings.incoming:
            raise HandshakeFailed(CloseCode.REFUSED, "a link token is used once")
        admit()
        incoming = Incoming(them, asyncio.get_running_loop().create_future())
        self._meetings.incoming[token] = incoming
        try:
            control_stream = self._meetings.take_over(control, Purpose.CONTROL)
            try:
                async with asyncio.timeout(self._meetings.options.auth_timeout_s):
                    await shake.welcome()
                    bulk, bulk_stream = await incoming.bulk
                stand = partial(self._meetings.stand, them, control, control_stream, bulk, bulk_stream)
                opening = LinkOpening(control_stream, bulk_stream, False, self._meetings.options, them.peer, stand)
                link = await opening.run()
            finally:
                del self._meetings.incoming[token]
            await link.wait_closed()
        finally:
            incoming.ended.set()

    async def _serve_bulk(
        self, bulk: Channel, hello: Hello, shake: ListenerHandshake, admit: Callable[[], None]
    ) -> None:
        incoming = self._meetings.incoming.get(hello.token)
        if incoming is None or incoming.identity != hello.identity or incoming.bulk.done():
            raise HandshakeFailed(CloseCode.NOT_NOW, "a bulk socket without its control socket")
        admit()
        stream = self._meetings.take_over(bulk, Purpose.BULK)
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
