"""Which queued passes a node computes next: decode first, prefill in chunks. Pure; knows no tensors and no clock.

Passes of one sequence run in the order they were added. A sequence whose next pass is one row counts as decoding; of
others' prefill it waits for one chunk at most. A prefill pass longer than the chunk is cut, so that decode steps
overtake it between chunks. While prompts wait, every other step is a chunk alone: it is short, so the chunk is at its
next stage sooner, and the decode passes that gather meanwhile share the cost of the step after it. Queues are bounded
by what admission lets in; nothing is dropped here.
"""

from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, replace

from helixd.ids import SequenceId


@dataclass(frozen=True, slots=True)
class Pass:
    """`n` rows of a sequence from position `start`, on the way to drawing token `step`.

    `handle` is the engine's id of the sequence at this attempt. Exactly one input: `token_ids` (n ids), or `rows`
    (n activations as raw bytes). `sample`: the pass ends with the token being drawn.
    """

    handle: SequenceId
    step: int
    start: int
    n: int
    sample: bool
    arrived_s: float
    token_ids: tuple[int, ...] | None = None
    rows: memoryview | None = None

    def split(self, n: int) -> tuple["Pass", "Pass"]:
        """The first `n` rows (which draw nothing) and the rest. `0 < n < self.n`."""
        ids, rows = self.token_ids, self.rows
        cut = 0 if rows is None else len(rows) // self.n * n
        head = replace(
            self, n=n, sample=False, token_ids=ids and ids[:n], rows=None if rows is None else rows[:cut]
        )  # fmt: skip
        tail = replace(
            self, start=self.start + n, n=self.n - n,
            token_ids=ids and ids[n:], rows=None if rows is None else rows[cut:],
        )  # fmt: skip
        return head, tail


PREFILL_TURNS = 1
"""How many steps of prefill alone there may be between steps that take decode passes (see `helixd.sim`)."""


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """`max_sequences` per step; `max_tokens` rows per step; `chunk_tokens` prefill rows per step."""

    max_sequences: int
    max_tokens: int
    chunk_tokens: int


class Batcher:
    """The passes that wait on one node."""

    def __init__(self, limits: BatchLimits) -> None:
        self.limits = limits
        self._decodes: OrderedDict[SequenceId, deque[Pass]] = OrderedDict()
        self._prefills: OrderedDict[SequenceId, deque[Pass]] = OrderedDict()
        self._queued_tokens = 0
        self._alone = 0

    @property
    def queued_tokens(self) -> int:
        """Rows that wait."""
        return self._queued_tokens

    def oldest_arrival_s(self) -> float | None:
        """When the longest-waiting pass came in, None if nothing waits."""
        heads = [queue[0].arrived_s for queue in (*self._decodes.values(), *self._prefills.values())]
        return min(heads, default=None)

    def add(self, item: Pass) -> None:
        """Queue a pass behind the earlier ones of its sequence."""
        self._queued_tokens += item.n
        if item.handle in self._prefills:
            self._prefills[item.handle].append(item)
        elif item.handle in self._decodes:
            self._decodes[item.handle].append(item)
        else:
            queues = self._decodes if item.n == 1 else self._prefills
            queues[item.handle] = deque([item])

    def drop(self, handle: SequenceId) -> None:
        """Forget what waits for a sequence."""
        for queues in (self._decodes, self._prefills):
            for item in queues.pop(handle, ()):
                self._queued_tokens -= item.n

    def next_batch(self, held_back: Callable[[SequenceId], bool] = lambda handle: False) -> list[Pass]:
        """Take the next step's passes, at most one per sequence; empty when nothing can run.

        `held_back` says which sequences' prefill must wait (their next hop takes nothing now); decode rows are few
        and go with the next step that is not prefill alone.
        """
        batch: list[Pass] = []
        prefills = [handle for handle in self._prefills if not held_back(handle)]
        alone = self._alone < PREFILL_TURNS and self._worth_a_step(prefills)
        self._alone = self._alone + 1 if alone else 0
        for handle in () if alone else list(self._decodes):
            if len(batch) >= min(self.limits.max_sequences, self.limits.max_tokens):
                break
            batch.append(self._take(self._decodes, handle, at_most=1))
        room = min(self.limits.chunk_tokens, self.limits.max_tokens - len(batch))
        for handle in prefills:
            if room <= 0 or len(batch) >= self.limits.max_sequences:
                break
            item = self._take(self._prefills, handle, at_most=room)
            room -= item.n
            batch.append(item)
        self._queued_tokens -= sum(item.n for item in batch)
        return batch

    def _worth_a_step(self, prefills: list[SequenceId]) -> bool:
        """Whether these have half a chunk at least: a few rows, as a slow link brings them, go with the decodes."""
        rows = 0
        for handle in prefills[: self.limits.max_sequences]:
            rows += self._prefills[handle][0].n
            if 2 * rows >= self.limits.chunk_tokens:
                return True
        return False

    def _take(self, queues: OrderedDict[SequenceId, deque[Pass]], handle: SequenceId, at_most: int) -> Pass:
        """The head of a sequence's queue, cut to `at_most` rows; the rest waits where its next pass belongs."""
        queue = queues.pop(handle)
        item = queue.popleft()
        if item.n > at_most:
            item, rest = item.split(at_most)
            queue.appendleft(rest)
        if queue and queue[0].n == 1:
            self._decodes[handle] = queue
        elif queue:
            self._prefills[handle] = queue
            # A half-done prefill keeps its place: finishing one prompt serves a client sooner than halving two.
            self._prefills.move_to_end(handle, last=False)
        return item
