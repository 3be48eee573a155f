"""How much slower a device is at work than when it was measured: times of real steps against those of the profile.

Pure: the clock comes in as an argument. Prefill and decode are told apart; a step with both counts for each by its
share of the time that was to be expected. Steps are weighed by their length, and fade as time passes and others follow:
it is the last few dozen of the last seconds that count. What was not done lately is not known.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from helixd.engine.types import LayerTimes
from helixd.layers import LayerRange

KEPT = 1 - 1 / 32
"""What a step leaves of the weight of those before it."""
FADE_S = 6.0
"""After so long a third of its weight is left."""
LEAST_STEPS = 2.0
"""Steps that a figure rests on at least, faded ones counting less."""
FRESH_S = 10.0

MOST = 1e6

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Expected:
    """What the profile says a step takes in its layers, in seconds."""

    prefill_s: float
    decode_s: float


class Slowdown(NamedTuple):
    """Times of steps over those expected: 2 is half as fast as measured. None: not known."""

    prefill: float | None
    decode: float | None


class _Kind:
    """Faded sums of one kind of work."""

    __slots__ = ("_at_s", "_expected_s", "_steps", "_took_s")

    def __init__(self) -> None:
        self._took_s = self._expected_s = self._steps = self._at_s = 0.0

    def add(self, took_s: float, expected_s: float, share: float, now_s: float) -> None:
        left = KEPT**share * math.exp(-max(0.0, now_s - self._at_s) / FADE_S)
        self._took_s = self._took_s * left + took_s
        self._expected_s = self._expected_s * left + expected_s
        self._steps = self._steps * left + share
        self._at_s = now_s

    def ratio(self, now_s: float) -> float | None:
        known = self._steps >= LEAST_STEPS and now_s - self._at_s <= FRESH_S
        return min(MOST, self._took_s / self._expected_s) if known else None


class SpeedGauge:
    """Watches one device that was measured to take `times`."""

    def __init__(self, times: LayerTimes) -> None:
        self._times = times
        self._prefill = _Kind()
        self._decode = _Kind()

    def expected(self, work: Sequence[tuple[LayerRange, int]]) -> Expected:
        """What a step of these stages and rows should take; one row is a decode."""
        prefill_s = decode_s = 0.0
        bounds = sorted({bound for layers, _ in work for bound in layers.to_pair()})
        for start, end in pairwise(bounds):
            active = [rows for layers, rows in work if layers.start <= start < layers.end]
            prompt = sum(rows for rows in active if rows > 1)
            decodes = sum(1 for rows in active if rows == 1)
            if prompt:
                prefill_s += (end - start) * _time_s(self._times.prompt_layer_time_s, prompt)
            if decodes:
                decode_s += (end - start) * _time_s(self._times.decode_layer_time_s, decodes)
        return Expected(prefill_s, decode_s)

    def took(self, expected: Expected, layers_s: float, now_s: float) -> None:
        """A step is done, and its layers took that long."""
        total_s = expected.prefill_s + expected.decode_s
        if total_s <= 0 or layers_s <= 0:
            return
        for kind, own_s in ((self._prefill, expected.prefill_s), (self._decode, expected.decode_s)):
            if own_s > 0:
                share = own_s / total_s
                kind.add(layers_s * share, own_s, share, now_s)

    def slowdown(self, now_s: float) -> Slowdown:
        """How the device does lately."""
        return Slowdown(self._prefill.ratio(now_s), self._decode.ratio(now_s))


def _time_s(points: Points, batch: float) -> float:
    """Linear between points, level before the first, the last slope beyond the last: as the planner reads them."""
    if batch <= points[0][0] or len(points) == 1:
        return points[0][1]
    high = min(bisect_left(points, batch, key=lambda point: point[0]), len(points) - 1)
    (x0, y0), (x1, y1) = points[high - 1], points[high]
    return max(0.0, y0 + (y1 - y0) * (batch - x0) / (x1 - x0))
