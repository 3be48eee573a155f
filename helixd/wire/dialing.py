"""Dialing a peer: two sockets, a handshake on each, and one link when both sides agree.

The dial of the smaller peer id stands when both dial at once; the other one yields and waits for that link.
"""

import os
from functools import partial

import aiohttp
from yarl import URL

from helixd.errors import PeerLost
from helixd.ids import PeerId
from helixd.wire.channel import Channel, PeerClientWebSocket
from helixd.wire.errors import AuthRejected, CloseCode, PeerRefused, VersionMismatch
from helixd.wire.handshake import TOKEN_BYTES, DialerHandshake, HandshakeFailed, Purpose, new_hello
from helixd.wire.link import Link
from helixd.wire.meeting import PEER_PATH, Meetings
from helixd.wire.opening import LinkOpening
from helixd.wire.peers import PeerIdentity
from helixd.wire.sockets import tune_socket


class Dialer:
    """Makes links from this side. `open` before the first dial, `close` after the last."""

    def __init__(self, meetings: Meetings, secret: bytes | None) -> None:
        self._meetings = meetings
        self._secret = secret
        self._session: aiohttp.ClientSession | None = None

    def open(self) -> None:
        """Get ready; needs a running loop."""
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None),
            ws_response_class=PeerClientWebSocket,
        )

    async def close(self) -> None:
        """No dial after this. Idempotent."""
        if self._session is not None:
            await self._session.close()

    async def dial(self, host: str, port: int, expect: PeerId | None, where: str) -> Link:
        """See `PeerNetwork.dial`; the caller keeps the deadline.

        Also raises aiohttp's errors, OSError, FrameError, and ValueError for an address that is none.
        """
        channels: list[Channel] = []
        them: PeerIdentity | None = None
        try:
            token = os.urandom(TOKEN_BYTES)
            channels.append(control := await self._open(host, port, bulk=False))
            shake = DialerHandshake(
                control.ws, new_hello(self._meetings.identity, Purpose.CONTROL, token), self._secret, where
            )
            them = (await shake.greet()).identity
            self._meetings.check_certificate(control, them)
            if expect is not None and them.peer != expect:
                raise HandshakeFailed(CloseCode.REFUSED, f"expected {expect}, {them.peer} answers")
            if self._meetings.being_linked(them):
                await control.hang_up(CloseCode.YIELDED, "already linked")
                return await self._meetings.registry.arrival(them)
            self._meetings.registry.judge(them, incoming=False)
            self._meetings.dialing[them.peer] = them.instance
            try:
                await shake.prove()
                control_stream = self._meetings.take_over(control, Purpose.CONTROL)
                channels.append(bulk := await self._open(host, port, bulk=True))
                shake = DialerHandshake(
                    bulk.ws, new_hello(self._meetings.identity, Purpose.BULK, token), self._secret, where
                )
                if (await shake.greet()).identity != them:
                    raise HandshakeFailed(CloseCode.NOT_NOW, f"{them.peer} changed while it was dialed")
                self._meetings.check_certificate(bulk, them)
                await shake.prove()
                bulk_stream = self._meetings.take_over(bulk, Purpose.BULK)
                stand = partial(self._meetings.stand, them, control, control_stream, bulk, bulk_stream)
                link = await LinkOpening(control_stream, bulk_stream, True, self._meetings.options, where, stand).run()
            finally:
                del self._meetings.dialing[them.peer]
            channels.clear()
            return link
        except PeerRefused as refusal:
            if refusal.code != CloseCode.YIELDED or them is None:
                raise
            return await self._meetings.registry.arrival(them)
        except HandshakeFailed as failure:
            for channel in channels:
                await channel.hang_up(failure.code, failure.reason)
            raise _our_refusal(where, failure) from failure
        finally:
            for channel in channels:
                channel.abort()
                await channel.release()

    async def _open(self, host: str, port: int, bulk: bool) -> Channel:
        if self._session is None or self._session.closed:
            raise PeerLost(f"{host}:{port}", "this daemon's peer endpoint is not open")
        tls = self._meetings.tls
        ws = await self._session.ws_connect(
            URL.build(scheme="http" if tls is None else "https", host=host, port=port, path=PEER_PATH),
            ssl=True if tls is None else tls.client,
            autoping=False,
            autoclose=False,
            heartbeat=None,
            compress=0,
            max_msg_size=self._meetings.options.max_message_bytes + 1,
            timeout=aiohttp.ClientWSTimeout(ws_receive=None, ws_close=self._meetings.options.close_timeout_s),
        )
        if not isinstance(ws, PeerClientWebSocket):
            raise TypeError(f"the client session made a {type(ws).__name__}")
        tune_socket(ws.get_extra_info("socket"), self._meetings.options, bulk)
        return Channel(ws, ws.transport, dialed=True)


def _our_refusal(where: str, failure: HandshakeFailed) -> Exception:
    """What a dialer raises when it is itself who ends the handshake."""
    if failure.code is CloseCode.AUTH_REJECTED:
        return AuthRejected(where, failure.reason)
    if failure.code is CloseCode.VERSION_MISMATCH:
        return VersionMismatch(f"{where}: {failure.reason}")
    if failure.code in (CloseCode.BAD_HELLO, CloseCode.NOT_NOW):
        return PeerLost(where, failure.reason)
    return PeerRefused(where, failure.code, failure.reason)
