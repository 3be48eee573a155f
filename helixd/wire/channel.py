"""One websocket of a link: aiohttp's object for the handshake, then our own stream over the same transport."""

import asyncio
from typing import Any

from aiohttp import ClientWebSocketResponse, web

from helixd.tls import certified_names
from helixd.wire.stream import MessageStream


class PeerClientWebSocket(ClientWebSocketResponse):
    """aiohttp's client websocket that remembers its transport."""

    def __init__(self, reader: Any, writer: Any, protocol: str | None, response: Any, *rest: Any, **more: Any) -> None:
        super().__init__(reader, writer, protocol, response, *rest, **more)
        connection = response.connection
        self.transport: asyncio.Transport | None = None if connection is None else connection.transport


WebSocket = web.WebSocketResponse | PeerClientWebSocket


class Channel:
    """An open websocket. `dialed` says that we are its client. After `take_over` only `stream` may be used."""

    def __init__(self, ws: WebSocket, transport: asyncio.Transport | None, dialed: bool) -> None:
        if transport is None:
            raise ConnectionResetError("the connection ended before the websocket stood")
        self.ws = ws
        self.dialed = dialed
        self.stream: MessageStream | None = None
        self._transport = transport

    @property
    def remote_host(self) -> str:
        """The peer's address as this side sees it ("" when unknown)."""
        peername = self._transport.get_extra_info("peername")
        return str(peername[0]) if isinstance(peername, tuple) and peername else ""

    @property
    def certified_names(self) -> frozenset[str]:
        """Who the peer's certificate speaks for; empty without TLS."""
        return certified_names(self._transport.get_extra_info("peercert"))

    def take_over(self, max_message_bytes: int, read_ahead_bytes: int, places: bool) -> MessageStream:
        """Read and write this websocket ourselves from now on; the peer must be quiet at this moment."""
        self.stream = MessageStream(self._transport, self.dialed, max_message_bytes, read_ahead_bytes, places)
        return self.stream

    async def hang_up(self, code: int, reason: str) -> None:
        """Say why and end the connection; bounded by aiohttp's close timeout."""
        if self.stream is None:
            await self.ws.close(code=code, message=reason.encode()[:120].decode(errors="ignore").encode())
        else:
            self.stream.stop()
            try:
                self.stream.write_close(code, reason)
            except ConnectionError:
                self.abort()
            self.stream.close()
        await self.release()

    async def release(self) -> None:
        """Let aiohttp forget the connection, which must have been ended."""
        await self.ws.close()

    def abort(self) -> None:
        """Cut the connection, whatever is buffered."""
        self._transport.abort()
