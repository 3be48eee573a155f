"""What a node knows about the sequences that pass through it: which are open, which are over, what came too early.

Decides whether an arriving frame is current, early (its `open` travels on another path), late (a tombstone says so), or
out of order within its attempt (small and bulk frames overtake each other); hands over passes in order. Pure.
"""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from helixd.ids import Attempt, Epoch, NodeId, SequenceId
from helixd.layers import LayerRange
from helixd.worker.batcher import Pass

TOMBSTONES = 65536
EARLY_BYTES = 64 << 20
PARKED_BYTES = 64 << 20
EARLY_AGE_S = 10.0


@dataclass(slots=True)
class LocalSequence:
    """One attempt of a sequence on one node. `next_node` None: this is its last stage."""

    handle: SequenceId
    sequence: SequenceId
    attempt: Attempt
    epoch: Epoch
    layers: LayerRange
    next_node: NodeId | None
    prompt_tokens: int
    score: bool
    prefix: tuple[int, ...]
    expected: int = 0
    parked: dict[int, Pass] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Early:
    """A pass whose `open` has not come yet."""

    attempt: Attempt
    item: Pass


class SequenceBook:
    """The one owner of a node's sequences, tombstones and early passes."""

    def __init__(self) -> None:
        self._open: dict[SequenceId, LocalSequence] = {}
        self._by_handle: dict[SequenceId, LocalSequence] = {}
        self._tombstones: OrderedDict[SequenceId, Attempt] = OrderedDict()
        self._early: OrderedDict[SequenceId, list[Early]] = OrderedDict()
        self._early_bytes = 0
        self._parked_bytes = 0
        self._next_handle = 1
        self.stale_frames = 0

    def __len__(self) -> int:
        return len(self._open)

    def __iter__(self) -> Iterator[LocalSequence]:
        return iter(list(self._open.values()))

    def new_handle(self) -> SequenceId:
        """An engine id, never used before."""
        handle = SequenceId(self._next_handle)
        self._next_handle += 1
        return handle

    def by_handle(self, handle: SequenceId) -> LocalSequence | None:
        """The open attempt with this engine id."""
        return self._by_handle.get(handle)

    def get(self, sequence: SequenceId, attempt: Attempt) -> LocalSequence | None:
        """The open attempt, if it is exactly this one."""
        found = self._open.get(sequence)
        return found if found is not None and found.attempt == attempt else None

    def is_over(self, sequence: SequenceId, attempt: Attempt) -> bool:
        """Whether this attempt was closed, or a later one has begun."""
        if self._tombstones.get(sequence, -1) >= attempt:
            return True
        found = self._open.get(sequence)
        return found is not None and found.attempt > attempt

    def open(self, local: LocalSequence) -> LocalSequence | None:
        """Add an attempt; returns the lower attempt of the same sequence that it replaces."""
        replaced = self._open.get(local.sequence)
        if replaced is not None:
            self._forget_parked(replaced)
            del self._by_handle[replaced.handle]
        self._open[local.sequence] = local
        self._by_handle[local.handle] = local
        return replaced

    def close(self, sequence: SequenceId, attempt: Attempt) -> LocalSequence | None:
        """End an attempt and all lower ones, leaving a tombstone; returns what was open."""
        self._tombstones[sequence] = max(attempt, self._tombstones.get(sequence, Attempt(-1)))
        self._tombstones.move_to_end(sequence)
        while len(self._tombstones) > TOMBSTONES:
            self._tombstones.popitem(last=False)
        self._forget_early(sequence, up_to=attempt)
        found = self._open.get(sequence)
        if found is None or found.attempt > attempt:
            return None
        self._forget_parked(found)
        del self._open[sequence]
        del self._by_handle[found.handle]
        return found

    def hold_early(self, sequence: SequenceId, early: Early) -> None:
        """Keep a pass until its `open` comes. Bounded: the oldest are dropped (their attempt then times out)."""
        early = Early(early.attempt, _apart(early.item))
        self._early.setdefault(sequence, []).append(early)
        self._early_bytes += _size(early.item)
        while self._early and self._early_bytes > EARLY_BYTES:
            self.stale_frames += len(self._forget_early(next(iter(self._early))))

    def take_early(self, sequence: SequenceId, attempt: Attempt) -> list[Pass]:
        """The passes that were waiting for this attempt's `open`; those of lower attempts are forgotten."""
        waiting = self._forget_early(sequence, up_to=attempt)
        return [early.item for early in waiting if early.attempt == attempt]

    def expire_early(self, now_s: float) -> None:
        """Drop early passes whose `open` never came."""
        for sequence in list(self._early):
            if now_s - self._early[sequence][0].item.arrived_s > EARLY_AGE_S:
                self.stale_frames += len(self._forget_early(sequence))

    def in_order(self, local: LocalSequence, item: Pass) -> list[Pass]:
        """The passes that can run now that `item` has come, in order; a pass ahead of its turn is parked.

        A position that was already handed over is stale: each comes once per attempt. So is what would be parked beyond
        `PARKED_BYTES` (its attempt then times out).
        """
        if item.start < local.expected or item.start in local.parked:
            self.stale_frames += 1
            return []
        if item.start > local.expected:
            if self._parked_bytes + _size(item) > PARKED_BYTES:
                self.stale_frames += 1
                return []
            local.parked[item.start] = _apart(item)
            self._parked_bytes += _size(item)
            return []
        ready = [item]
        local.expected += item.n
        while (following := local.parked.pop(local.expected, None)) is not None:
            self._parked_bytes -= _size(following)
            ready.append(following)
            local.expected += following.n
        return ready

    def _forget_parked(self, local: LocalSequence) -> None:
        self._parked_bytes -= sum(map(_size, local.parked.values()))
        local.parked.clear()

    def _forget_early(self, sequence: SequenceId, up_to: Attempt | None = None) -> list[Early]:
        """Take out what waits for a sequence, of attempts `up_to` this one only: a later one's `open` may be near."""
        waiting = self._early.pop(sequence, [])
        taken = [early for early in waiting if up_to is None or early.attempt <= up_to]
        if len(taken) < len(waiting):
            self._early[sequence] = [early for early in waiting if up_to is not None and early.attempt > up_to]
        self._early_bytes -= sum(_size(early.item) for early in taken)
        return taken


def _apart(item: Pass) -> Pass:
    """The pass with rows of its own: it may have to wait, and its frame may hold the rows of many."""
    return item if item.rows is None else replace(item, rows=memoryview(bytearray(item.rows)))


def _size(item: Pass) -> int:
    return len(item.rows) if item.rows is not None else 4 * item.n
