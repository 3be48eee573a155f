"""Server-sent events as OpenAI frames them: `data: {json}` frames, comments while idle, `[DONE]` only on success.

Decides framing, keep-alive and what happens to a reader that does not read. Nothing is sent before every generation is
admitted, so refusals keep their status. After that an error is a frame of its own, and the stream ends without
`[DONE]`.
"""

import asyncio
import logging
from collections.abc import Mapping
from typing import Protocol

import msgspec
from aiohttp import web

from helixd import logs
from helixd.api.envelope import Json
from helixd.api.errors import ApiError, of_failed, where
from helixd.api.flight import Flight, task_group
from helixd.api.options import ApiOptions
from helixd.api.output import OutputBuffer
from helixd.coordinator.generation import Event, Failed
from helixd.errors import HelixError

log = logging.getLogger("helixd.api")

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"

HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}


class ClientGone(HelixError):
    """The client closed its connection, or read so slowly that it was closed for it."""


class Chunks(Protocol):
    """How an endpoint turns events into the chunks of its stream."""

    def opening(self) -> list[Json]:
        """Before any event."""
        ...

    def of(self, prompt: int, event: Event) -> list[Json]:
        """The chunks of one event."""
        ...

    def closing(self) -> list[Json]:
        """After every choice has finished."""
        ...


def frame(body: Json) -> bytes:
    """One event; JSON escapes line breaks, so it is one line."""
    return b"data: " + msgspec.json.encode(body) + b"\n\n"


class SseWriter:
    """Writes one stream to one client, each write with a deadline."""

    def __init__(self, request: web.Request, write_stall_s: float) -> None:
        self.response = web.StreamResponse(headers=HEADERS)
        self._request = request
        self._write_stall_s = write_stall_s
        self.slow = False

    async def open(self, headers: Mapping[str, str]) -> None:
        """Send the headers; from here on the status is 200. Raises ClientGone."""
        self.response.headers.update(headers)
        try:
            await self.response.prepare(self._request)
        except ConnectionError as error:
            raise ClientGone("the client closed its connection") from error

    async def write(self, data: bytes) -> None:
        """Send some frames. Raises ClientGone."""
        if not data:
            return
        try:
            async with asyncio.timeout(self._write_stall_s):
                await self.response.write(data)
        except TimeoutError:
            self.slow = True
            if self._request.transport is not None:
                self._request.transport.abort()
            raise ClientGone(f"the client read nothing for {self._write_stall_s:g} s") from None
        except ConnectionError as error:
            raise ClientGone("the client closed its connection") from error


async def stream_answer(request: web.Request, flight: Flight, chunks: Chunks, options: ApiOptions) -> SseWriter:
    """Run the flight and stream its chunks. Raises ApiError and Refused only before the headers are sent."""
    writer = SseWriter(request, options.write_stall_s)
    buffer = OutputBuffer(options.output_chunks, producers=len(flight.prepared.requests))
    try:
        async with task_group() as group:
            flight.start(group, buffer.put, buffer.end)
            await flight.admitted.wait()
            await writer.open(flight.route_headers)
            await writer.write(b"".join(map(frame, chunks.opening())))
            await _forward(buffer, writer, chunks, options.keep_alive_s)
            await writer.write(b"".join(map(frame, chunks.closing())) + DONE)
    except ClientGone:
        flight.outcome = "slow_client" if writer.slow else "client_gone"
    except Exception as error:
        if not writer.response.prepared:
            raise
        await _end_with_error(writer, flight, error)
    return writer


async def _forward(buffer: OutputBuffer, writer: SseWriter, chunks: Chunks, keep_alive_s: float) -> None:
    while True:
        try:
            async with asyncio.timeout(keep_alive_s):
                events = await buffer.take()
        except TimeoutError:
            await writer.write(KEEP_ALIVE)
            continue
        if not events:
            return
        frames: list[bytes] = []
        for prompt, event in events:
            if isinstance(event, Failed):
                await writer.write(b"".join(frames))
                raise of_failed(event)
            frames.extend(map(frame, chunks.of(prompt, event)))
        await writer.write(b"".join(frames))


async def _end_with_error(writer: SseWriter, flight: Flight, error: Exception) -> None:
    if not isinstance(error, ApiError):
        logs.event(log, logging.ERROR, "stream_failed", error=type(error).__name__, at=where(error))
        error = ApiError(500, "The server failed to finish this request.", code="internal_error")
    flight.outcome = error.code or str(error.status)
    writer.response.force_close()
    try:
        await writer.write(frame(error.body()))
    except ClientGone:
        flight.outcome += ",client_gone"
