"""The queue in front of the pipelines: bounded, by priority, first come first served, without head-of-line blocking.

Knows no requests and no clock: items are opaque, time is an argument (monotonic seconds). When the head cannot be
admitted yet, smaller ones behind it may pass for a while; then they stand back for a while so that room can gather
for the head; and so on, standing back twice as long each time, since room gathers only as fast as answers end. So
neither waits for ever: the head gets in, and the others wait no longer in one go than the head has waited.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from helixd.errors import HelixError

T = TypeVar("T")


class QueueFull(HelixError):
    """The queue has no place left; the client should come again later."""


@dataclass(eq=False, slots=True)
class Ticket(Generic[T]):
    """A place in the queue. `deadline_s`: when waiting any longer is of no use (None: no limit)."""

    item: T
    priority: int
    arrived_s: float
    deadline_s: float | None = None
    order: int = 0
    blocked_since_s: float | None = field(default=None)


class AdmissionQueue(Generic[T]):
    """Waiting items. Higher `priority` first, equal ones by arrival.

    `passing_s`: how long others may pass a head that does not fit; `holding_s`: how long they first stand back then.
    `tries`: how many that do not fit are asked at a time, so that a long line costs no more than a short one.
    """

    def __init__(self, limit: int, *, passing_s: float = 2.0, holding_s: float = 2.0, tries: int = 32) -> None:
        if limit < 0:
            raise ValueError(f"limit must be at least 0, is {limit}")
        if tries < 1:
            raise ValueError(f"tries must be at least 1, is {tries}")
        self._tries = tries
        self._limit = limit
        self._passing_s = passing_s
        self._holding_s = holding_s
        self._waiting: list[Ticket[T]] = []
        self._count = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def push(self, item: T, *, now_s: float, priority: int = 0, deadline_s: float | None = None) -> Ticket[T]:
        """Queue an item. Raises QueueFull."""
        if len(self._waiting) >= self._limit:
            raise QueueFull(f"{len(self._waiting)} requests are waiting already: try again later")
        self._count += 1
        ticket = Ticket(item, priority, now_s, deadline_s, self._count)
        self._waiting.append(ticket)
        self._waiting.sort(key=lambda waiting: (-waiting.priority, waiting.order))
        return ticket

    def remove(self, ticket: Ticket[T]) -> bool:
        """Take a ticket out (cancelled); whether it was still waiting."""
        if ticket in self._waiting:
            self._waiting.remove(ticket)
            return True
        return False

    def expired(self, now_s: float) -> list[Ticket[T]]:
        """Take out and return those whose deadline has come."""
        late = [t for t in self._waiting if t.deadline_s is not None and t.deadline_s <= now_s]
        self._waiting = [t for t in self._waiting if t not in late]
        return late

    def admit(self, now_s: float, admits: Callable[[T], bool]) -> list[Ticket[T]]:
        """Take out and return everybody who gets in now, in order.

        `admits(item)` tries to admit (and, if it can, does: draws the route); it is asked at most once per item.
        """
        admitted: list[Ticket[T]] = []
        refused = 0
        for ticket in tuple(self._waiting):
            if admits(ticket.item):
                self._waiting.remove(ticket)
                admitted.append(ticket)
                continue
            if ticket is self._waiting[0]:
                if ticket.blocked_since_s is None:
                    ticket.blocked_since_s = now_s
                if self._stand_back(now_s - ticket.blocked_since_s):
                    break
            refused += 1
            if refused >= self._tries:
                break
        return admitted

    def _stand_back(self, blocked_s: float) -> bool:
        """Whether others wait for a head that has not fitted for so long."""
        holding_s = self._holding_s
        while 0 < holding_s and blocked_s >= self._passing_s + holding_s:
            blocked_s -= self._passing_s + holding_s
            holding_s *= 2
        return holding_s > 0 and blocked_s >= self._passing_s
