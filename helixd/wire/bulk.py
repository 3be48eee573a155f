"""Sending large payloads over the bulk socket: a header message, then the raw bytes in chunks, each its own message.

A frame that its sender gave up on ends early with an empty message. Nothing is copied here. The task that writes is
never cancelled while the link stands, so a caller that is cancelled waits until the transport has let go of its memory.
"""

import asyncio
from collections import deque
from dataclasses import dataclass

from helixd.errors import PeerLost
from helixd.wire.credits import CreditGate
from helixd.wire.stream import MessageStream


@dataclass(slots=True, eq=False)
class _Job:
    header: bytes
    payload: memoryview
    charge: int
    done: asyncio.Future[None]
    started: bool = False
    abandoned: bool = False


class BulkSender:
    """Sends one frame after another. `progress` rises with every chunk the transport took."""

    def __init__(self, stream: MessageStream, gate: CreditGate, chunk_bytes: int) -> None:
        self.progress = 0
        self._stream = stream
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
        stream, payload, chunk_bytes = self._stream, job.payload, self._chunk_bytes
        stream.write(job.header)
        for start in range(0, payload.nbytes, chunk_bytes):
            if job.abandoned:
                stream.write(b"")
                break
            stream.write(payload[start : start + chunk_bytes])
            await stream.drain()
            self.progress += 1
        await stream.flush()
