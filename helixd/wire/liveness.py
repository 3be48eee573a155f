"""When a silent peer is dead, counted so that a stall of our own process is never held against it. Pure.

Silence is added up tick by tick, and no tick counts for more than its nominal length: if our own event loop (or this
whole process) stood still for a minute, that minute counts as one tick, and the answers that wait in the socket are
read before the next one.
"""


class SilenceClock:
    """Adds up silence in ticks of `tick_s`; `limit_s` of it is too much."""

    __slots__ = ("_last_s", "_silence_s", "limit_s", "tick_s")

    def __init__(self, tick_s: float, limit_s: float, now_s: float) -> None:
        self.tick_s = tick_s
        self.limit_s = limit_s
        self._last_s = now_s
        self._silence_s = 0.0

    def heard(self) -> None:
        """A sign of life (or of progress) came."""
        self._silence_s = 0.0

    def tick(self, now_s: float) -> bool:
        """Whether the silence has reached the limit at this tick."""
        self._silence_s += min(now_s - self._last_s, self.tick_s)
        self._last_s = now_s
        # A tick that comes a hair early must not cost a whole further one.
        return self._silence_s >= self.limit_s - self.tick_s / 8
