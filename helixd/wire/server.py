"""The listening side's door: an aiohttp server that lets nobody linger before authentication.

A connection is a stranger from the accept until `admit`. At most `max_pending` strangers are connected at a time, each
may send `preauth_bytes` in all (HTTP request included) and stay `auth_timeout_s`; beyond that its connection is
aborted. aiohttp has no deadline for a request's headers, so the count starts at the socket.
"""

import asyncio
import logging
from typing import Any

from aiohttp import web
from aiohttp.web_server import Server

from helixd import logs
from helixd.wire.options import WireOptions

logger = logging.getLogger(__name__)


class GuardedHandler(web.RequestHandler):
    """One connection of the peer port."""

    __slots__ = ("_door", "_expiry", "_received_bytes", "_stranger", "deadline_s")

    def __init__(self, door: "PeerServer", **kwargs: Any) -> None:
        super().__init__(door, **kwargs)
        self._door = door
        self._stranger = False
        self._received_bytes = 0
        self._expiry: asyncio.TimerHandle | None = None
        self.deadline_s = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Count the stranger, or turn it away."""
        super().connection_made(transport)
        options = self._door.options
        if len(self._door.strangers) >= options.max_pending:
            logs.event(
                logger, logging.WARNING, "peer_refused", reason="too many wait to be let in", limit=options.max_pending
            )
            self._abort()
            return
        self._stranger = True
        self._door.strangers.add(self)
        self.deadline_s = self._loop.time() + options.auth_timeout_s
        # The handshake itself ends at the deadline with a close code; this is for those who never get that far.
        self._expiry = self._loop.call_at(self.deadline_s + options.close_timeout_s, self._abort)

    def connection_lost(self, exc: BaseException | None) -> None:
        """Forget the stranger."""
        self.admit()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Count a stranger's bytes before anything parses them."""
        if self._stranger:
            self._received_bytes += len(data)
            if self._received_bytes > self._door.options.preauth_bytes:
                self._abort()
                return
        super().data_received(data)

    def admit(self) -> None:
        """No stranger any more."""
        if self._stranger:
            self._stranger = False
            self._door.strangers.discard(self)
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None

    def _abort(self) -> None:
        if self.transport is not None:
            self.transport.abort()


class PeerServer(Server):
    """The factory of GuardedHandlers for `loop.create_server`."""

    def __init__(self, handler: Any, options: WireOptions) -> None:
        super().__init__(handler, access_log=None, logger=logger, keepalive_timeout=options.auth_timeout_s)
        self.options = options
        self.strangers: set[GuardedHandler] = set()

    def __call__(self) -> GuardedHandler:
        """A protocol for one accepted connection."""
        return GuardedHandler(self, loop=self._loop, **self._kwargs)
