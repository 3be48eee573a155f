"""How long a device's steps take, and when the running one has taken so long that the device must hang.

Pure: the clock comes in as an argument.
"""

LONGEST_USUAL = 20.0
FORGET = 0.99


class StepPace:
    """One device's steps. `usual_s` is the longest of the recent ones; it fades by a hundredth with every step."""

    def __init__(self) -> None:
        self.started_s: float | None = None
        self.usual_s = 0.0

    def begin(self, now_s: float) -> None:
        """A step is handed to the device."""
        self.started_s = now_s

    def end(self, now_s: float) -> None:
        """It is done."""
        assert self.started_s is not None
        self.usual_s = max(now_s - self.started_s, self.usual_s * FORGET)
        self.started_s = None

    def excuse(self, seconds: float) -> None:
        """The whole process stood still for so long (it was stopped, the machine slept): that is no step's time."""
        if self.started_s is not None:
            self.started_s += seconds

    def overdue(self, now_s: float, limit_s: float) -> float | None:
        """The running step's age, if that is more than `limit_s` and more than twenty times the usual; else None."""
        if self.started_s is None:
            return None
        age_s = now_s - self.started_s
        return age_s if age_s > max(limit_s, LONGEST_USUAL * self.usual_s) else None
