"""What waits between a request's generations and its socket: bounded, and never a brake on the generation.

The one mutable buffer of a stream. When `limit` entries wait for a slow reader, new text joins its choice's last
waiting entry, so at most `limit` entries and a few per choice wait; their text is bounded by the request's own
output length.
"""

import asyncio
from collections import deque
from dataclasses import dataclass

from helixd.coordinator.generation import Delta, Event


@dataclass(slots=True)
class _Waiting:
    prompt: int
    event: Event


class OutputBuffer:
    """Events of a request on their way to one writer. One consumer; closes when every producer has ended."""

    def __init__(self, limit: int, producers: int) -> None:
        self._limit = limit
        self._producers = producers
        self._queue: deque[_Waiting] = deque()
        self._last: dict[tuple[int, int], _Waiting] = {}
        self._changed = asyncio.Event()

    def __len__(self) -> int:
        return len(self._queue)

    def put(self, prompt: int, event: Event) -> None:
        """Add an event of the generation of prompt number `prompt`."""
        if not isinstance(event, Delta):
            self._queue.append(_Waiting(prompt, event))
        else:
            key = (prompt, event.choice)
            last = self._last.get(key)
            if len(self._queue) >= self._limit and last is not None and isinstance(last.event, Delta):
                last.event = Delta(event.choice, last.event.text + event.text, last.event.tokens + event.tokens)
            else:
                self._last[key] = _Waiting(prompt, event)
                self._queue.append(self._last[key])
        self._changed.set()

    def end(self) -> None:
        """One producer has ended."""
        self._producers -= 1
        self._changed.set()

    async def take(self) -> list[tuple[int, Event]]:
        """All that waits, in order, once anything does; empty when every producer has ended and nothing is left."""
        while not self._queue and self._producers > 0:
            self._changed.clear()
            await self._changed.wait()
        taken = [(waiting.prompt, waiting.event) for waiting in self._queue]
        self._queue.clear()
        self._last.clear()
        return taken
