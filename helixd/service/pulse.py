"""When a daemon is alive enough to say so: its event loop comes round in time, and no device hangs.

Pure: the clock comes in as an argument. A process that hangs cannot pet its watchdog, and one whose device hangs must
not; both are then started again by the service manager.
"""

MAX_LAG_S = 5.0
PETS_PER_INTERVAL = 3


class Pulse:
    """Asked at every tick of the event loop whether to pet the watchdog now. `interval_s` None: there is none."""

    def __init__(self, interval_s: float | None, max_lag_s: float = MAX_LAG_S) -> None:
        self.interval_s = interval_s
        self._max_lag_s = max_lag_s
        self._due_s = float("-inf")

    @property
    def tick_s(self) -> float:
        """How often to ask."""
        return 1.0 if self.interval_s is None else min(1.0, self.interval_s / PETS_PER_INTERVAL / 2)

    def beat(self, now_s: float, lag_s: float, overdue: bool) -> bool:
        """Whether to pet. `lag_s`: how much later than asked for the loop came round; `overdue`: a device hangs."""
        if self.interval_s is None or now_s < self._due_s or lag_s >= self._max_lag_s or overdue:
            return False
        # A tick early, or the pet would come up to a tick late.
        self._due_s = now_s + self.interval_s / PETS_PER_INTERVAL - self.tick_s
        return True
