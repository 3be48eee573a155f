"""What a link carries while more waits for it: the only time when that says something of the link. Pure.

What is sent first goes into buffers on the way at no time at all, so it is not counted; neither is a queue that is
empty again too soon.
"""

SKIPPED_BYTES = 4 << 20
"""More than a socket's buffers hold on either side."""
LEAST_BYTES = 1 << 20
LEAST_S = 0.25
FRESH_S = 15.0
_GAIN = 0.5


class Goodput:
    """One direction of one link. Times are monotonic seconds."""

    __slots__ = ("_bytes", "_counting_since_s", "_rate", "_seen_s", "_skipped")

    def __init__(self) -> None:
        self._skipped = self._bytes = 0
        self._counting_since_s: float | None = None
        self._rate = self._seen_s = 0.0

    def sent(self, size_bytes: int, now_s: float, *, more: bool) -> None:
        """The link has taken so much; `more`: something waited behind it."""
        since_s = self._counting_since_s
        if since_s is None:
            self._skipped += size_bytes
            if self._skipped >= SKIPPED_BYTES:
                self._counting_since_s = now_s
        else:
            self._bytes += size_bytes
            if self._bytes >= LEAST_BYTES and now_s - since_s >= LEAST_S:
                self._take(self._bytes / (now_s - since_s), now_s)
                self._bytes, self._counting_since_s = 0, now_s
        if not more:
            self._skipped = self._bytes = 0
            self._counting_since_s = None

    def seen(self, now_s: float) -> float | None:
        """Bytes per second lately; None where the link had no more to carry than it could."""
        return self._rate if self._rate and now_s - self._seen_s <= FRESH_S else None

    def _take(self, rate: float, now_s: float) -> None:
        known = self.seen(now_s)
        self._rate = rate if known is None else known + _GAIN * (rate - known)
        self._seen_s = now_s
