"""When a silent peer is dead, counted so that a stall of our own process is never held against it. Pure.

Silence is added up tick by tick, and no tick counts for more than its nominal length: if our own event loop (or this
whole process) stood still for a minute, that minute counts as one tick, and the answers that wait in the socket are
read before the next one.
"""

_RTT_GAIN = 0.25


class SilenceClock:
    """Adds up silence in ticks of `tick_s`; `limit_s` of it is too much."""

    __slots__ = ("_last_s", "_silence_s", "limit_s", "tick_s")

    def __init__(self, tick_s: float, limit_s: float, now_s: float) -> None:
        self.tick_s = tick_s
        self.limit_s = limit_s
        self._last_s = now_s
        self._silence_s = 0.0

    def tick(self, now_s: float, heard: bool) -> bool:
        """`heard`: whether a sign of life came since the last tick. True once the silence has reached the limit."""
        passed_s = min(now_s - self._last_s, self.tick_s)
        self._last_s = now_s
        self._silence_s = 0.0 if heard else self._silence_s + passed_s
        # A tick that comes a hair early must not cost a whole further one.
        return self._silence_s >= self.limit_s - self.tick_s / 8


class ProgressWatch:
    """Whether what waits to be sent is taken at all: no progress for `limit_s` while something waits is too long."""

    __slots__ = ("_clock", "_last")

    def __init__(self, tick_s: float, limit_s: float, now_s: float) -> None:
        self._clock = SilenceClock(tick_s, limit_s, now_s)
        self._last = 0

    def tick(self, now_s: float, progress: int, waiting: bool) -> bool:
        """`progress` counts what was taken so far. True once it has stood still for too long."""
        taken, self._last = progress != self._last, progress
        return self._clock.tick(now_s, taken or not waiting)


class RoundTrip:
    """The smoothed time between a ping and its answer; `smoothed_s` is None before the first."""

    __slots__ = ("_sent_s", "_token", "smoothed_s")

    def __init__(self) -> None:
        self.smoothed_s: float | None = None
        self._token = 0
        self._sent_s = 0.0

    def sent(self, now_s: float) -> int:
        """A ping goes out now; the token its answer must carry."""
        self._token += 1
        self._sent_s = now_s
        return self._token

    def answered(self, token: int, now_s: float) -> None:
        """An answer came; one to an older ping says nothing."""
        if token == self._token:
            taken_s = now_s - self._sent_s
            before_s = self.smoothed_s
            self.smoothed_s = taken_s if before_s is None else before_s + _RTT_GAIN * (taken_s - before_s)
