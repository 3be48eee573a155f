"""Large payloads over the bulk socket: a header message, then the raw bytes in chunks, each its own message.

A frame that its sender gave up on ends early with an empty message. Nothing here is copied at the sender; the receiver
copies each chunk once, into the memory the handler will own. The sender's task is never cancelled while the link
stands, so a caller that is cancelled waits until the transport has let go of its memory.
"""

import asyncio
from collections import deque
from dataclasses import dataclass

import numpy as np

from helixd.errors import PeerLost
from helixd.wire.credits import CreditGate
from helixd.wire.errors import FrameError
from helixd.wire.frames import decode_bulk_header
from helixd.wire.sockets import WebSocket


def empty_buffer(size_bytes: int) -> memoryview:
    """Writable memory of `size_bytes` that nobody has zeroed first."""
    return np.empty(size_bytes, dtype=np.uint8).data


@dataclass(slots=True, eq=False)
class _Job:
    header: bytes
    payload: memoryview
    charge: int
    done: asyncio.Future[None]
    started: bool = False
    abandoned: bool = False


class BulkSender:
    """Sends one frame after another. `progress` rises with every chunk the transport took.

    `transport` is given where the transport may keep references to the caller's memory (a server does not mask and so
    does not copy), None where it copies (a client masks).
    """

    def __init__(self, ws: WebSocket, transport: asyncio.Transport | None, gate: CreditGate, chunk_bytes: int) -> None:
        self.progress = 0
        self._ws = ws
        self._transport = transport
        self._gate = gate
        self._chunk_bytes = chunk_bytes
        self._jobs: deque[_Job] = deque()
        self._wake = asyncio.Event()

    @property
    def waiting(self) -> bool:
        """Whether a frame is being sent or waits for its turn."""
        return bool(self._jobs)

    async def send(self, header: bytes, payload: memoryview, charge: int) -> None:
        """Send one frame whose `charge` was taken from the gate.

        When this returns, raises or is cancelled, nothing refers to `payload` any more. Raises what `fail` was given.
        """
        job = _Job(header, payload, charge, asyncio.get_running_loop().create_future())
        self._jobs.append(job)
        self._wake.set()
        try:
            await asyncio.shield(job.done)
        except asyncio.CancelledError:
            job.abandoned = True
            while job.started and not job.done.done():
                # A second cancellation must not free the memory either; the link's send deadline bounds the wait.
                try:
                    await asyncio.wait([job.done])
                except asyncio.CancelledError:
                    continue
            if job.done.done():
                job.done.exception()
            raise

    async def run(self) -> None:
        """The task that writes; ends only by cancellation or a connection error."""
        while True:
            while self._jobs:
                job = self._jobs[0]
                if job.abandoned:
                    self._gate.restore(job.charge)
                else:
                    job.started = True
                    await self._transmit(job)
                self._jobs.popleft()
                if not job.done.done():
                    job.done.set_result(None)
            self._wake.clear()
            await self._wake.wait()

    def fail(self, error: PeerLost) -> None:
        """Let every sender raise `error`. The socket must be cut already."""
        for job in self._jobs:
            if not job.done.done():
                job.done.set_exception(error)

    async def _transmit(self, job: _Job) -> None:
        send_bytes = self._ws.send_bytes
        payload, chunk_bytes = job.payload, self._chunk_bytes
        await send_bytes(job.header)
        for start in range(0, payload.nbytes, chunk_bytes):
            if job.abandoned:
                await send_bytes(b"")
                break
            # aiohttp declares bytes and takes any flat buffer.
            await send_bytes(payload[start : start + chunk_bytes])  # type: ignore[arg-type]
            self.progress += 1
        if self._transport is not None and self._transport.get_write_buffer_size():
            await self._flush(self._transport)

    async def _flush(self, transport: asyncio.Transport) -> None:
        # With both limits at zero the transport counts as paused until it is empty, and an unsolicited pong, which
        # every peer ignores, waits for that.
        transport.set_write_buffer_limits(high=0)
        try:
            await self._ws.pong(b"")
        finally:
            transport.set_write_buffer_limits()


class BulkReceiver:
    """Puts frames together from the messages of one bulk socket.

    Payloads of `discard_kind` (bandwidth probes) are counted, not kept.
    """

    def __init__(self, max_body_bytes: int, max_frame_bytes: int, discard_kind: int) -> None:
        self._max_body_bytes = max_body_bytes
        self._max_frame_bytes = max_frame_bytes
        self._discard_kind = discard_kind
        self._header: tuple[int, object, int] | None = None
        self._buffer: memoryview | None = None
        self._filled = 0

    def header(self, message: bytes) -> int | None:
        """The payload size if `message` begins a frame, None if it belongs to one. Raises FrameError."""
        if self._header is not None:
            return None
        self._header = decode_bulk_header(message, self._max_body_bytes, self._max_frame_bytes)
        kind, _, payload_bytes = self._header
        self._buffer = None if kind == self._discard_kind else empty_buffer(payload_bytes)
        self._filled = 0
        return payload_bytes

    def chunk(self, message: bytes) -> tuple[int, object, memoryview | None, bool] | None:
        """`(kind, body, payload, whole)` when `message` ends a frame, else None. Raises FrameError.

        `whole` is False for a frame its sender gave up on.
        """
        if self._header is None:
            raise FrameError("a chunk without a header")
        kind, body, payload_bytes = self._header
        end = self._filled + len(message)
        if end > payload_bytes:
            raise FrameError(f"a bulk frame of kind {kind} announced {payload_bytes} bytes and carries more")
        if self._buffer is not None:
            self._buffer[self._filled : end] = message
        self._filled = end
        if message and end < payload_bytes:
            return None
        payload, self._header, self._buffer = self._buffer, None, None
        return kind, body, payload, bool(message)
