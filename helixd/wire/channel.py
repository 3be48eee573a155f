"""One websocket of a link: aiohttp's object to write with, its transport, and how to end it."""

import asyncio
import struct
from typing import Any

from aiohttp import ClientWebSocketResponse, WSMsgType, web

from helixd.wire.reader import MessageReader
from helixd.wire.sockets import write_now

MAX_REASON_BYTES = 120


class PeerClientWebSocket(ClientWebSocketResponse):
    """aiohttp's client websocket that remembers its transport."""

    def __init__(self, reader: Any, writer: Any, protocol: str | None, response: Any, *rest: Any, **more: Any) -> None:
        super().__init__(reader, writer, protocol, response, *rest, **more)
        connection = response.connection
        self.transport: asyncio.Transport | None = None if connection is None else connection.transport


WebSocket = web.WebSocketResponse | PeerClientWebSocket


class Channel:
    """An open websocket. `dialed` says that we are its client, whose frames aiohttp masks and copies."""

    def __init__(self, ws: WebSocket, transport: asyncio.Transport | None, dialed: bool) -> None:
        if transport is None:
            raise ConnectionResetError("the connection ended before the websocket stood")
        self.ws = ws
        self.transport = transport
        self.dialed = dialed

    @property
    def remote_host(self) -> str:
        """The peer's address as this side sees it ("" when unknown)."""
        peername = self.transport.get_extra_info("peername")
        return str(peername[0]) if isinstance(peername, tuple) and peername else ""

    def take_over(self, max_message_bytes: int, read_ahead_bytes: int) -> MessageReader:
        """Read this websocket ourselves from now on; the peer must be quiet at this moment."""
        return MessageReader(self.transport, not self.dialed, max_message_bytes, read_ahead_bytes)

    def write_now(self, message: bytes) -> None:
        """Write one message without waiting. Raises ConnectionError."""
        write_now(self.ws.send_bytes(message))

    def write_close(self, code: int, reason: str) -> None:
        """Write a close frame without waiting. Raises ConnectionError."""
        told = reason.encode()[:MAX_REASON_BYTES].decode(errors="ignore").encode()
        write_now(self.ws.send_frame(struct.pack("!H", code) + told, WSMsgType.CLOSE))

    def abort(self) -> None:
        """Cut the connection, whatever is buffered."""
        self.transport.abort()
