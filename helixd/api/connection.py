"""One client connection: what aiohttp's own leaves open.

A connection beyond the cap gets a 503 and is closed; one whose first request's headers do not arrive in time is closed
(aiohttp has no such timer); a request that is not HTTP gets an error in the API's shape; and aiohttp's log lines, which
may quote header bytes and with them a key, are replaced by ones that do not.
"""

import asyncio
import logging
from http import HTTPStatus
from typing import cast

import msgspec
from aiohttp import hdrs, web

from helixd import logs
from helixd.api.errors import JSON_TYPE, ApiError, where
from helixd.api.middleware import REQUEST_ID_HEADER, SERVER, new_request_id
from helixd.api.options import ApiOptions

log = logging.getLogger("helixd.api")


class Connection(web.RequestHandler):
    """aiohttp's connection with a cap, a header timer and errors in shape."""

    __slots__ = ("_header_timer", "_options", "_server")

    def __init__(self, server: web.Server, options: ApiOptions, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(
            server,
            loop=loop,
            keepalive_timeout=options.keepalive_timeout_s,
            max_line_size=options.header_line_bytes,
            max_field_size=options.header_line_bytes,
            max_headers=options.header_lines,
            # Compressed bodies are refused; inflating them first would be work done for a stranger.
            auto_decompress=False,
            access_log=None,  # type: ignore[arg-type]
            logger=log,
        )
        self._server = server
        self._options = options
        self._header_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the connection, or turn it away when there are too many."""
        super().connection_made(transport)
        if len(self._server.connections) > self._options.connections:
            # uvloop's transports are no subclasses of asyncio's, which a check would want.
            cast(asyncio.Transport, transport).write(_turned_away())
            self.force_close()
            return
        self._header_timer = self._loop.call_later(self._options.headers_timeout_s, self._close_without_request)

    def connection_lost(self, exc: BaseException | None) -> None:
        """Forget the timer."""
        if self._header_timer is not None:
            self._header_timer.cancel()
        super().connection_lost(exc)

    def _close_without_request(self) -> None:
        if self._request_count == 0:
            self.force_close()

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        """The answer to a request that is not HTTP, or to an error outside the application."""
        # As in the overridden method: an answer that has begun cannot become another one.
        if request.writer.output_size > 0:
            raise ConnectionError("the answer has begun already; cannot send an error instead")
        if status >= 500:
            at = where(exc) if exc else "unknown"
            logs.event(log, logging.ERROR, "connection_failed", error=type(exc).__name__, at=at)
            error = ApiError(status, "The server failed to answer this request.", code="internal_error")
        else:
            error = ApiError(
                status, "The request is not valid HTTP, or its headers are too large.", code="invalid_http"
            )
        response = error.response()
        # The application's own finishing of answers does not see this one.
        response.headers[REQUEST_ID_HEADER] = new_request_id()
        response.headers[hdrs.SERVER] = SERVER
        response.force_close()
        return response

    def log_exception(self, *args: object, **kw: object) -> None:
        """Aiohttp's report of an unexpected error, without its text."""
        error = kw.get("exc_info")
        at = where(error) if isinstance(error, BaseException) else "unknown"
        logs.event(log, logging.ERROR, "connection_failed", error=type(error).__name__, at=at)


def _turned_away() -> bytes:
    error = ApiError(503, "The server has as many connections as it takes; try again.", code="too_many_connections")
    body = msgspec.json.encode(error.body())
    lines = [
        f"HTTP/1.1 503 {HTTPStatus(503).phrase}",
        f"Content-Type: {JSON_TYPE}",
        f"Content-Length: {len(body)}",
        "Retry-After: 1",
        "Connection: close",
        f"{hdrs.SERVER}: {SERVER}",
        f"{REQUEST_ID_HEADER}: {new_request_id()}",
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body
