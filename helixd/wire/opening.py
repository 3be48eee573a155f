"""The last step before a link stands: each side tells what it grants, and both start with the same knowledge.

The dialer speaks first. The listener answers when its own end stands, so a dialer that has its link knows that the
listener has it too, and whatever follows the answer already belongs to the link.
"""

import asyncio
from collections.abc import Callable

from helixd.errors import PeerLost
from helixd.wire.errors import CloseCode, FrameError
from helixd.wire.handshake import HandshakeFailed, closed_error
from helixd.wire.options import WireOptions
from helixd.wire.setup import Grant, own_grant
from helixd.wire.stream import MessageStream
from helixd.wire.websocket import WebSocketLink


class LinkOpening:
    """The control socket's sink until the peer's grant came. `stand` makes, registers and returns the link."""

    def __init__(
        self,
        control: MessageStream,
        bulk: MessageStream,
        dialed: bool,
        options: WireOptions,
        where: str,
        stand: Callable[[Grant], WebSocketLink],
    ) -> None:
        self._control = control
        self._bulk = bulk
        self._dialed = dialed
        self._options = options
        self._where = where
        self._stand = stand
        self._standing: asyncio.Future[WebSocketLink] = asyncio.get_running_loop().create_future()

    async def run(self) -> WebSocketLink:
        """Raises PeerLost, HandshakeFailed (we refuse; the peer must be told) or what the peer's close code means."""
        self._control.start(self)
        if self._dialed:
            self._control.write(own_grant(self._options).encode())
        try:
            async with asyncio.timeout(self._options.auth_timeout_s):
                return await self._standing
        except TimeoutError as error:
            raise PeerLost(self._where, f"sent no setup within {self._options.auth_timeout_s} s") from error

    def place(self, _: int) -> memoryview | None:
        """Setup messages are small."""
        return None

    def placed(self) -> None:
        """Never happens."""

    def message(self, data: memoryview | bytearray) -> None:
        """The peer's grant."""
        if self._standing.done():
            raise FrameError("a message before the link stands")
        grant = Grant.decode(data)
        try:
            link = self._stand(grant)
        except (HandshakeFailed, PeerLost, ConnectionError) as error:
            self._control.stop()
            self._standing.set_exception(error)
            return
        self._control.start(link)
        self._bulk.start(link.bulk_receiver)
        self._standing.set_result(link)

    def closing(self, code: int, reason: str) -> None:
        """The peer does not want the link."""
        self._fail(closed_error(self._where, code, reason))

    def broken(self, error: FrameError) -> None:
        """The peer broke the protocol."""
        self._fail(HandshakeFailed(CloseCode.BAD_HELLO, str(error)))

    def ended(self, error: Exception | None) -> None:
        """The connection is gone."""
        self._fail(PeerLost(self._where, f"the connection ended before the link stood: {error or 'closed'}"))

    def _fail(self, error: Exception) -> None:
        if not self._standing.done():
            self._standing.set_exception(error)
