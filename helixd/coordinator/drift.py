"""When what is measured at work is so far from what was planned with, for so long, that a plan should be made anew.

Pure: the clock comes in as an argument. A reading is off when it differs from its belief by more than a factor, either
way. A subject (a node, a link) has drifted when one of its readings was off to the same side for longer than a time; a
reading that is in between, or that is not seen for a while, starts the time anew. Whoever asks is expected to believe
from then on what was measured: the same reading is then no news.

A subject that keeps drifting is not believed as quickly: each drift doubles its time, up to sixteen times, until it has
been quiet for long. What swings faster than that changes no plan; what swings slowly changes few.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Literal

GAP_S = 15.0
"""Longer without a reading, and it says nothing of the time between."""
MOST_DOUBLINGS = 4
QUIET = 64.0
"""In times: after so long without a drift, a subject's first time counts again."""

Quantity = Literal["prefill", "decode", "bandwidth", "rtt"]


@dataclass(frozen=True, slots=True)
class DriftOptions:
    """`factor`: more than 1. `hold_s`: for how long a reading must be off."""

    factor: float = 2.0
    hold_s: float = 60.0


@dataclass(frozen=True, slots=True)
class Reading:
    """What was measured of a subject and what is planned with, in the same unit; both above 0."""

    quantity: Quantity
    measured: float
    believed: float


@dataclass(frozen=True, slots=True)
class Drift:
    """The reading that was off for long enough, and for how long it was."""

    reading: Reading
    for_s: float


@dataclass(slots=True)
class _Off:
    above: bool
    since_s: float
    last_s: float


@dataclass(slots=True)
class _History:
    off: dict[Quantity, _Off] = field(default_factory=dict)
    drifts: int = 0
    last_drift_s: float = 0.0


class DriftJudge:
    """The one owner of how long readings have been off."""

    def __init__(self, options: DriftOptions) -> None:
        self.options = options
        self._histories: dict[Hashable, _History] = {}

    def see(self, subject: Hashable, readings: Sequence[Reading], now_s: float) -> Drift | None:
        """Take in what is known of a subject now. A drift is told once: the time then starts anew."""
        history = self._histories.setdefault(subject, _History())
        hold_s = self._hold_s(history, now_s)
        found: Drift | None = None
        for reading in readings:
            for_s = self._off_for(history, reading, now_s)
            if for_s is not None and for_s > hold_s and (found is None or for_s > found.for_s):
                found = Drift(reading, for_s)
        if found is not None:
            history.off.clear()
            history.drifts += 1
            history.last_drift_s = now_s
        return found

    def forget(self, subject: Hashable) -> None:
        """The subject is new again: what was off is over. How often it drifted is remembered."""
        if (history := self._histories.get(subject)) is not None:
            history.off.clear()
            if not history.drifts:
                del self._histories[subject]

    def off_for_s(self, subject: Hashable, now_s: float) -> float | None:
        """For how long a subject has been off by now; None if it is not."""
        history = self._histories.get(subject)
        known = [off for off in history.off.values() if now_s - off.last_s <= GAP_S] if history else []
        return max((now_s - off.since_s for off in known), default=None)

    def _off_for(self, history: _History, reading: Reading, now_s: float) -> float | None:
        ratio, factor = reading.measured / reading.believed, self.options.factor
        if 1 / factor <= ratio <= factor:
            history.off.pop(reading.quantity, None)
            return None
        off = history.off.get(reading.quantity)
        if off is None or off.above != (ratio > factor) or now_s - off.last_s > GAP_S:
            off = history.off[reading.quantity] = _Off(ratio > factor, now_s, now_s)
        off.last_s = now_s
        return now_s - off.since_s

    def _hold_s(self, history: _History, now_s: float) -> float:
        if now_s - history.last_drift_s > QUIET * self.options.hold_s:
            history.drifts = 0
        return self.options.hold_s * float(2 ** min(history.drifts, MOST_DOUBLINGS))
