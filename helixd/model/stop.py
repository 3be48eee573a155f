"""Stop strings over streamed text: what may be sent now, and whether generation is at its end.

Pure. Text is cut before the stop string that is completed first (of several completed by the same character, the
longest), so the outcome depends on the text alone and not on how it was cut into pieces. Only text that may still
become part of a stop string is held back.
"""

from collections.abc import Iterable


class StopMatcher:
    """One per choice. Work per piece is bounded by the piece and the longest stop string, not by the whole text."""

    def __init__(self, stops: Iterable[str]) -> None:
        """Raises ValueError for an empty stop string."""
        self._stops = tuple(stops)
        if "" in self._stops:
            raise ValueError("a stop string must not be empty")
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""
        self._stopped = False

    @property
    def stopped(self) -> bool:
        """Whether a stop string was completed."""
        return self._stopped

    def feed(self, text: str) -> tuple[str, bool]:
        """The text to send now, and whether a stop string ends it. After a stop everything is swallowed."""
        if self._stopped:
            return "", True
        if not self._stops:
            return text, False
        text = self._held + text
        matches = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if matches:
            self._stopped, self._held = True, ""
            return text[: min(matches)[1]], True
        keep = self._held_from(text)
        self._held = text[keep:]
        return text[:keep], False

    def flush(self) -> str:
        """What was held back, once it is certain that no more text comes."""
        held, self._held = self._held, ""
        return held

    def _held_from(self, text: str) -> int:
        """Where the longest end of the text begins that a stop string may continue."""
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            tail = text[start:]
            if any(stop.startswith(tail) for stop in self._stops):
                return start
        return len(text)
