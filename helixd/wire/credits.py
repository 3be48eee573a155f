"""Application-level credits: how much a sender may have under way that the receiver's handlers have not finished.

Both ends compute the same charge for a frame: its bytes plus a constant, at most half a window. The receiver returns
credits in lots of at most half a window, so at rest more than half of it is free and no frame can wait for ever,
whatever its size. One window per direction and class.
"""

import asyncio
from collections import deque

from helixd.errors import PeerLost
from helixd.wire.errors import FrameError

FRAME_OVERHEAD_BYTES = 256


def frame_charge(frame_bytes: int, window_bytes: int) -> int:
    """What a frame of `frame_bytes` costs of a window; the constant bounds how many tiny frames fit into it."""
    return min(frame_bytes + FRAME_OVERHEAD_BYTES, window_bytes // 2)


class CreditGate:
    """The sender's side. Waiters pass in the order they came; each may write before the next one is woken."""

    __slots__ = (
        "_available",
        "_max_charge",
        "_waiters",
        "progress",
        "window_bytes",
    )

    def __init__(self, window_bytes: int) -> None:
        self.window_bytes = window_bytes
        self.progress = 0
        self._max_charge = window_bytes // 2
        self._available = window_bytes
        self._waiters: deque[tuple[asyncio.Future[None], int]] = deque()

    @property
    def waiting(self) -> bool:
        """Whether somebody waits for credits."""
        return bool(self._waiters)

    def take(self, frame_bytes: int) -> int:
        """The charge of a frame, taken; 0 if it is not to be had now or somebody waits for theirs."""
        charge = frame_bytes + FRAME_OVERHEAD_BYTES
        if charge > self._max_charge:
            charge = self._max_charge
        if charge > self._available or self._waiters:
            return 0
        self._available -= charge
        return charge

    async def acquire(self, frame_bytes: int) -> int:
        """Take a frame's charge, waiting for it. Raises what `fail` was given. No await before the caller resumes."""
        charge = self.take(frame_bytes)
        if charge:
            return charge
        charge = frame_charge(frame_bytes, self.window_bytes)
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (granted, charge)
        self._waiters.append(entry)
        try:
            await granted
        except asyncio.CancelledError:
            if granted.done() and not granted.cancelled() and granted.exception() is None:
                self._available += charge
            raise
        finally:
            self._waiters.remove(entry)
            self._wake()
        return charge

    def give(self, credit: int) -> None:
        """Credits came back. Raises FrameError if they are more than were taken."""
        if credit < 1 or self._available + credit > self.window_bytes:
            raise FrameError(f"the peer returned {credit} credits that were never taken")
        self._available += credit
        self.progress += 1
        self._wake()

    def restore(self, charge: int) -> None:
        """Give back credits of a frame that was never sent."""
        self._available += charge
        self._wake()

    def fail(self, error: PeerLost) -> None:
        """Let every waiter raise `error`."""
        for granted, _ in self._waiters:
            if not granted.done():
                granted.set_exception(error)

    def _wake(self) -> None:
        if self._waiters:
            granted, charge = self._waiters[0]
            if not granted.done() and charge <= self._available:
                self._available -= charge
                granted.set_result(None)


class CreditReturn:
    """The receiver's side: notes what came in and what was handled, and when credits are worth a message.

    They are once `lot_bytes` (a quarter of the window unless said, at most half) are owed.
    """

    __slots__ = (
        "_lot_bytes",
        "_max_charge",
        "_outstanding",
        "_owed",
        "window_bytes",
    )

    def __init__(self, window_bytes: int, lot_bytes: int | None = None) -> None:
        self.window_bytes = window_bytes
        self._max_charge = window_bytes // 2
        self._lot_bytes = min(lot_bytes or window_bytes // 4, window_bytes // 2)
        self._outstanding = 0
        self._owed = 0

    def took(self, frame_bytes: int) -> int:
        """A frame came in; returns its charge. Raises FrameError if the sender had no credits for it."""
        charge = frame_bytes + FRAME_OVERHEAD_BYTES
        if charge > self._max_charge:
            charge = self._max_charge
        self._outstanding += charge
        if self._outstanding > self.window_bytes:
            raise FrameError(f"the peer sent more than its window of {self.window_bytes} bytes")
        return charge

    def handled(self, charge: int) -> int:
        """A frame is done with; returns the credits to send back now (0: hold them until there are more)."""
        self._owed += charge
        if self._owed < self._lot_bytes:
            return 0
        credit, self._owed = self._owed, 0
        self._outstanding -= credit
        return credit
