"""What waits to be sent to each peer, and the task that sends it, so that nobody who posts ever waits for a socket.

One outbox per peer. Bounded in bytes: past `soft_bytes` the outbox is *congested* and whoever can should hold back;
past `hard_bytes` the peer takes nothing and its link is closed, which its owner hears of like any other loss.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable

from helixd.errors import PeerLost
from helixd.wire.errors import FrameError
from helixd.wire.goodput import Goodput
from helixd.wire.link import Frame, Link

FRAME_OVERHEAD_BYTES = 256
HARD_BYTES = 256 << 20


class Outbox:
    """Frames on the way to one peer, in order; urgent ones, in order too, overtake those that are not."""

    def __init__(
        self, link: Link, on_drained: Callable[[], None], soft_bytes: int = 32 << 20, hard_bytes: int = HARD_BYTES
    ) -> None:
        self.link = link
        self._on_drained = on_drained
        self._soft_bytes = soft_bytes
        self._hard_bytes = hard_bytes
        self._urgent: deque[Frame] = deque()
        self._frames: deque[Frame] = deque()
        self._bytes = 0
        self._more = asyncio.Event()
        self._overflow = False
        self._goodput = Goodput()

    def goodput_bytes_per_s(self) -> float | None:
        """What the link carried lately while more waited; None where nothing did."""
        return self._goodput.seen(time.monotonic())

    @property
    def congested(self) -> bool:
        """Whether what can wait should wait."""
        return self._bytes > self._soft_bytes

    def post(self, frame: Frame, *, urgent: bool = False) -> None:
        """Queue a frame. Never waits; over the hard bound the link is closed instead."""
        if self.link.closed is not None or self._overflow:
            return
        (self._urgent if urgent else self._frames).append(frame)
        self._bytes += _cost(frame)
        if self._bytes > self._hard_bytes:
            self._overflow = True
            self._clear()
        self._more.set()

    async def run(self) -> None:
        """Send until the link closes."""
        while True:
            await self._more.wait()
            if self._overflow:
                await self.link.close(f"{self._hard_bytes >> 20} MiB wait for this peer and it takes nothing")
                return
            if not (self._urgent or self._frames):
                self._more.clear()
                continue
            frame = (self._urgent or self._frames).popleft()
            try:
                await self.link.send(frame)
            except PeerLost:
                # Whoever watches the link is told by its on_lost handler; here only the queue ends.
                self._clear()
                return
            except FrameError as error:
                # A peer that grants too little for what it must hear cannot follow any more; nobody else is to suffer.
                self._clear()
                await self.link.close(f"what must be said next cannot be sent: {error}")
                return
            was_congested = self.congested
            self._bytes -= _cost(frame)
            self._goodput.sent(_cost(frame), time.monotonic(), more=self._bytes > 0)
            if was_congested and not self.congested:
                self._on_drained()

    def _clear(self) -> None:
        self._urgent.clear()
        self._frames.clear()


def _cost(frame: Frame) -> int:
    return FRAME_OVERHEAD_BYTES + (0 if frame.payload is None else frame.payload.nbytes)
