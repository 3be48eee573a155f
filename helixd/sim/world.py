"""Simulated time: a heap of what happens when. Knows nothing of what the events are about.

Events of the same instant happen in the order they were set, so a run is the same every time.
"""

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any


class World:
    """The clock and what is still to come. `now_s` is read freely and set by `run` alone."""

    __slots__ = ("_heap", "_set", "events", "now_s")

    def __init__(self) -> None:
        self.now_s = 0.0
        self.events = 0
        self._heap: list[tuple[float, int, Callable[[Any], None], Any]] = []
        self._set = 0

    def at(self, time_s: float, call: Callable[[Any], None], argument: Any = None) -> None:
        """Have `call(argument)` happen at `time_s`, which is not before now."""
        self._set += 1
        heappush(self._heap, (time_s, self._set, call, argument))

    def run(self, until_s: float) -> None:
        """Let everything happen that is due before `until_s`; then it is `until_s`."""
        heap = self._heap
        events = 0
        while heap and heap[0][0] < until_s:
            now_s, _, call, argument = heappop(heap)
            self.now_s = now_s
            call(argument)
            events += 1
        self.events += events
        self.now_s = max(self.now_s, until_s)

    @property
    def idle(self) -> bool:
        """Whether nothing is to come."""
        return not self._heap


def run_window(
    world: World, start_s: float, end_s: float, begin: Callable[[], None], progress: Callable[[float], None] | None
) -> None:
    """Run to `start_s`, call `begin`, run to `end_s`; tell `progress` the share done, a hundred times."""
    steps = 100 if progress else 1
    begun = False
    for step in range(1, steps + 1):
        until_s = end_s * step / steps
        if not begun and start_s <= until_s:
            world.run(start_s)
            begin()
            begun = True
        world.run(until_s)
        if progress:
            progress(step / steps)
