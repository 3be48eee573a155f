"""The two halves of the peer protocol by hand, so that tests can say what no honest daemon says."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import aiohttp
from aiohttp import web

from helixd.ids import Incarnation, PeerId
from helixd.wire.channel import PeerClientWebSocket
from helixd.wire.handshake import DialerHandshake, ListenerHandshake, Purpose, new_hello
from helixd.wire.meeting import PEER_PATH
from helixd.wire.options import WireOptions
from helixd.wire.peers import PeerIdentity
from helixd.wire.setup import own_grant
from tests.functional.wire_world import DEADLINE_S, SECRET

TOKEN = b"t" * 16
Address = tuple[str, int]


def identity(name: str, incarnation: int = 1) -> PeerIdentity:
    return PeerIdentity(PeerId(name), Incarnation(incarnation))


@asynccontextmanager
async def socket_to(address: Address) -> AsyncIterator[PeerClientWebSocket]:
    """A websocket to a peer port with nothing said yet."""
    async with (
        aiohttp.ClientSession(ws_response_class=PeerClientWebSocket) as session,
        session.ws_connect(
            f"http://{address[0]}:{address[1]}{PEER_PATH}", autoping=False, autoclose=False, max_msg_size=0
        ) as ws,
    ):
        assert isinstance(ws, PeerClientWebSocket)
        assert ws.transport is not None
        try:
            yield ws
        finally:
            # Else aiohttp waits for the other side's farewell.
            ws.transport.abort()


async def goodbye(ws: aiohttp.ClientWebSocketResponse) -> tuple[int | None, str]:
    """Code and reason of the close frame that ends what the other side says; (None, "") if it just went."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            message = await ws.receive()
            if message.type is aiohttp.WSMsgType.CLOSE:
                return message.data, message.extra or ""
            if message.type is not aiohttp.WSMsgType.BINARY:
                return None, ""


class Stranger:
    """A dialer that is let in, and from then on writes what it wants on either socket."""

    def __init__(self, control: PeerClientWebSocket, bulk: PeerClientWebSocket) -> None:
        self.control = control
        self.bulk = bulk

    def raw(self, data: bytes, bulk: bool = False) -> None:
        transport = (self.bulk if bulk else self.control).transport
        assert transport is not None
        transport.write(data)

    async def say(self, message: bytes, bulk: bool = False) -> None:
        await (self.bulk if bulk else self.control).send_bytes(message)


@asynccontextmanager
async def stranger(
    address: Address, name: str = "stranger", incarnation: int = 1, setup: bytes | None = None
) -> AsyncIterator[Stranger]:
    """One that knows the secret. `setup` replaces its first message on the control socket; b"" sends none."""
    me = identity(name, incarnation)
    async with asyncio.timeout(DEADLINE_S), socket_to(address) as control, socket_to(address) as bulk:
        for ws, purpose in ((control, Purpose.CONTROL), (bulk, Purpose.BULK)):
            shake = DialerHandshake(ws, new_hello(me, purpose, TOKEN), SECRET, "far")
            await shake.greet()
            await shake.prove()
        if setup != b"":
            await control.send_bytes(setup or own_grant(WireOptions()).encode())
        if setup is None:
            assert (await control.receive()).type is aiohttp.WSMsgType.BINARY
        yield Stranger(control, bulk)


Script = Callable[[web.WebSocketResponse], Awaitable[None]]


@asynccontextmanager
async def impostor(script: Script) -> AsyncIterator[Address]:
    """A peer port where `script` plays the listener, once for every socket."""

    async def serve(request: web.BaseRequest) -> web.StreamResponse:
        ws = web.WebSocketResponse(autoping=False, autoclose=False, max_msg_size=0, timeout=0.1)
        await ws.prepare(request)
        await script(ws)
        return ws

    runner = web.ServerRunner(web.Server(serve), shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    try:
        yield str(host), int(port)
    finally:
        await runner.cleanup()


async def listen_honestly(ws: web.WebSocketResponse, me: PeerIdentity) -> None:
    """The listener's half up to its proof."""
    shake = ListenerHandshake(ws, me, SECRET, "near")
    await shake.challenge()
    await shake.welcome()
