"""Received frames of one class on their way to the handler: one at a time, in order, bounded by credits."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable

from helixd.wire.credits import CreditReturn
from helixd.wire.link import Frame


class Inbox:
    """A queue and its only consumer. `give_back` is called with credits that are worth a message."""

    def __init__(self, credits: CreditReturn, give_back: Callable[[int], None]) -> None:
        self.credits = credits
        self._give_back = give_back
        self._queue: deque[tuple[Frame, int]] = deque()
        self._wake = asyncio.Event()
        self._handling = False
        self._stopped = False

    @property
    def empty(self) -> bool:
        """Whether nothing waits and nothing is being handled."""
        return not self._queue and not self._handling

    def put(self, frame: Frame, charge: int) -> None:
        """Queue a frame whose `charge` the credits have taken note of."""
        self._queue.append((frame, charge))
        self._wake.set()

    def done(self, charge: int) -> None:
        """Something of `charge` is finished with."""
        credit = self.credits.handled(charge)
        if credit:
            self._give_back(credit)

    async def run(self, handle: Callable[[Frame], Awaitable[None]], drained: Callable[[], None]) -> None:
        """Hand every frame to `handle`; tell `drained` whenever none is left. Ends by cancellation or `stop`."""
        queue = self._queue
        while not self._stopped:
            while queue and not self._stopped:
                frame, charge = queue.popleft()
                self._handling = True
                try:
                    await handle(frame)
                finally:
                    self._handling = False
                self.done(charge)
            self._wake.clear()
            drained()
            await self._wake.wait()

    def stop(self) -> None:
        """Deliver nothing more. A handler that is running may end in peace."""
        self._stopped = True
        self._queue.clear()
        self._wake.set()
