"""Layer times as a function that is asked often: `helixd.plan.cluster.profile.layer_time_s`, looked up faster."""

from bisect import bisect_left
from collections.abc import Sequence


class Curve:
    """Linear between points, level before the first, the last slope beyond the last.

    `from_one`: points at batches below 1 are left out. A table that starts with "no sequence, no time" says nothing
    of half a sequence, and a batch of one takes as long as the smallest that was measured. Raises ValueError if no
    point is left.
    """

    __slots__ = ("_x", "_y")

    def __init__(self, points: Sequence[tuple[float, float]], *, from_one: bool = False) -> None:
        kept = [point for point in points if point[0] >= 1 or not from_one]
        if not kept:
            raise ValueError("no layer times were measured")
        self._x = [x for x, _ in kept]
        self._y = [y for _, y in kept]

    def at(self, batch: float) -> float:
        """Seconds for one layer at `batch`."""
        x, y = self._x, self._y
        if batch <= x[0] or len(x) == 1:
            return y[0]
        high = min(bisect_left(x, batch), len(x) - 1)
        low = high - 1
        return y[low] + (y[high] - y[low]) * (batch - x[low]) / (x[high] - x[low])
