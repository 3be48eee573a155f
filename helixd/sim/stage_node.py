"""A node as helixd's engine is: whole-range stages with mid-range entry, decode first, prefill in chunks.

A step takes every decode pass that waits (up to `max_sequences`) and prefill rows up to the chunk, the oldest prompt
first; between two such steps there may be some of prefill alone. At each layer the batch is everybody who entered at
or before it.
"""

from dataclasses import dataclass
from math import inf

from helixd.ids import NodeId
from helixd.layers import LayerRange
from helixd.sim.job import Job
from helixd.sim.times import COPY_S_PER_BYTE, LayerTimes
from helixd.sim.wires import Wire
from helixd.sim.world import World


@dataclass(frozen=True, slots=True)
class StepLimits:
    """What one step may hold: decode passes, and prefill rows.

    `prefill_turns`: while prompts wait, how many steps of prefill alone there are between steps with decode passes.
    """

    max_sequences: int = 512
    chunk_tokens: int = 128
    prefill_turns: int = 1


@dataclass(eq=False, slots=True)
class _Prefill:
    """Rows of one prompt that wait here; `at` is where its route comes by."""

    job: Job
    at: int
    entry: int
    rows: int = 0


_Step = tuple[int, list[Job], list[tuple[Job, int, int]]]


class StageNode:
    """Takes passes off its wires and puts them on the next ones. `decode_pass_s`: seconds of steps, once per pass."""

    __slots__ = (
        "_alone", "_copy_s", "_life", "_limits", "_prefills", "_ready", "_segments", "_times", "_world",
        "asleep_until_s", "batches", "busy_s", "decode_pass_s", "decodes", "down", "held", "id", "inbound", "prompt_s",
    )  # fmt: skip

    def __init__(
        self,
        world: World,
        node: NodeId,
        held: LayerRange,
        times: LayerTimes,
        limits: StepLimits,
        activation_bytes: float,
    ) -> None:
        self.id = node
        self.held = held
        self.asleep_until_s = inf
        self.inbound: list[Wire] = []
        self.busy_s = self.prompt_s = 0.0
        self.batches = self.decodes = 0
        self.decode_pass_s = 0.0
        self.down = False
        self._alone = 0
        self._life = 0
        self._world = world
        self._times = times
        self._limits = limits
        self._copy_s = activation_bytes * COPY_S_PER_BYTE
        self._ready: dict[int, list[Job]] = {held.start: []}
        self._segments: list[tuple[int, int]] = [(held.start, len(held))]
        self._prefills: dict[Job, _Prefill] = {}

    def connect(self, wire: Wire) -> None:
        """A wire leads here; passes on it enter at `wire.entry`."""
        wire.receiver = self
        self.inbound.append(wire)
        self._ready.setdefault(wire.entry, [])
        entries = sorted(self._ready)
        self._segments = [
            (start, end - start) for start, end in zip(entries, [*entries[1:], self.held.end], strict=True)
        ]

    def wake(self, at_s: float) -> None:
        """See Receiver."""
        if self.asleep_until_s == at_s:
            self._start()

    def queue_length(self) -> float:
        """Passes that wait here or are on their way."""
        waiting = sum(len(jobs) for jobs in self._ready.values()) + len(self._prefills)
        return waiting + sum(len(wire.queue) for wire in self.inbound)

    def queued_rows(self) -> int:
        """Prefill rows that have come and wait."""
        return sum(found.rows for found in self._prefills.values())

    def forget_everything(self) -> None:
        """The node is gone, and all that waited for it."""
        self.down = True
        self._life += 1
        self.asleep_until_s = -inf
        for wire in self.inbound:
            wire.forget()
        for jobs in self._ready.values():
            jobs.clear()
        self._prefills.clear()

    def come_back(self) -> None:
        """The node serves again."""
        self.down = False
        self._start()

    def _start(self) -> None:
        if self.down:
            return
        self._take_in()
        limits, ready = self._limits, self._ready
        chunks: list[tuple[Job, int, int]] = []
        rows_at: dict[int, int] = {}
        if self._prefills:
            self._fill(limits.chunk_tokens, chunks, rows_at)
        # A step without decode passes is short: chunks move on sooner, and the passes share the next step's cost.
        # A few rows, as they trickle in from a slow link, are not worth a step.
        alone = self._alone < limits.prefill_turns and 2 * sum(rows_at.values()) >= limits.chunk_tokens
        self._alone = self._alone + 1 if alone else 0
        decodes: list[Job] = []
        decodes_at: list[int] = []
        for entry, _ in self._segments:
            here = ready[entry]
            if here and not alone:
                free = limits.max_sequences - len(decodes)
                if len(here) <= free:
                    decodes += here
                    ready[entry] = []
                else:
                    decodes += here[:free]
                    ready[entry] = here[free:]
            decodes_at.append(len(decodes))
        took_s, prompt_s, rows = 0.0, 0.0, 0
        times = self._times
        for (entry, layers), count in zip(self._segments, decodes_at, strict=True):
            if rows_at:
                rows += rows_at.get(entry, 0)
            if count or rows:
                took_s += layers * times.layer_s(rows, count)
                prompt_s += layers * times.prompt(rows)
        if not decodes and not chunks:
            self._sleep()
            return
        self.asleep_until_s = -inf
        took_s += (rows + len(decodes)) * self._copy_s
        self.busy_s += took_s
        self.prompt_s += prompt_s
        self.batches += 1
        self.decodes += len(decodes)
        self.decode_pass_s += took_s * len(decodes)
        self._world.at(self._world.now_s + took_s, self._done, (self._life, decodes, chunks))

    def _fill(self, room: int, chunks: list[tuple[Job, int, int]], rows_at: dict[int, int]) -> None:
        """Take up to `room` prefill rows, the oldest prompt's first."""
        for found in list(self._prefills.values()):
            if room <= 0:
                break
            if not found.job.alive:
                del self._prefills[found.job]
                continue
            rows = found.rows if found.rows <= room else room
            found.rows -= rows
            room -= rows
            chunks.append((found.job, found.at, rows))
            rows_at[found.entry] = rows_at.get(found.entry, 0) + rows
            if not found.rows:
                del self._prefills[found.job]

    def _done(self, step: _Step) -> None:
        life, decodes, chunks = step
        if life != self._life:
            return
        for job in decodes:
            if job.alive:
                hop = job.hop = job.hop + 1
                wire = job.wires[hop]
                wire.send(job, 0)
                if wire.receiver is None and job.feedback is not None:
                    _feed_back(job)
        for job, at, rows in chunks:
            if job.alive:
                wire = job.wires[at + 1]
                if wire.receiver is None:
                    job.arrived_rows += rows
                    if job.arrived_rows == job.rows:
                        wire.send(job, 0)
                        if job.feedback is not None:
                            _feed_back(job)
                else:
                    wire.send(job, rows)
        self._start()

    def _take_in(self) -> None:
        now_s = self._world.now_s
        for wire in self.inbound:
            queue = wire.queue
            while queue and queue[0][0] <= now_s:
                _, job, rows = queue.popleft()
                if not job.alive:
                    continue
                if not rows:
                    self._ready[wire.entry].append(job)
                    continue
                found = self._prefills.get(job)
                if found is None:
                    found = self._prefills[job] = _Prefill(job, job.wires.index(wire), wire.entry)
                found.rows += rows

    def _sleep(self) -> None:
        next_s = min((wire.queue[0][0] for wire in self.inbound if wire.queue), default=inf)
        self.asleep_until_s = next_s
        if next_s < inf:
            self._world.at(next_s, self.wake, next_s)


def _feed_back(job: Job) -> None:
    """The token just drawn goes to the first stage too, unless it was the last one."""
    if job.drawn < job.request.output_tokens:
        job.drawn += 1
        job.hop = 0
        assert job.feedback is not None
        job.feedback.send(job, 0)
