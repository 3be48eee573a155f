"""What was found to have drifted and may have recovered where no work shows it: when to look again. Pure.

A node that a plan left out, a link that carries less than it could: nothing is measured there any more. So they are
measured again, rarely, and ever more rarely.
"""

from collections.abc import Hashable

AGAIN_S = 900.0
MOST_S = 7200.0


class Suspects:
    """The one owner of when to look again."""

    def __init__(self) -> None:
        self._due: dict[Hashable, tuple[float, float]] = {}

    def add(self, subject: Hashable, now_s: float) -> None:
        """It has drifted now."""
        self._due[subject] = (now_s + AGAIN_S, AGAIN_S)

    def drop(self, subject: Hashable) -> None:
        """It is gone, or is seen at work."""
        self._due.pop(subject, None)

    def due(self, subject: Hashable, now_s: float) -> bool:
        """Whether to look again now; if so, the next time is twice as far off."""
        at_s, waited_s = self._due.get(subject, (None, 0.0))
        if at_s is None or now_s < at_s:
            return False
        wait_s = min(MOST_S, 2 * waited_s)
        self._due[subject] = (now_s + wait_s, wait_s)
        return True
