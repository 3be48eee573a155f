"""A node as the paper's simulator has it: one layer at a time, cyclically, a first-come-first-served batch in front."""

from collections.abc import Callable
from math import inf

from helixd.ids import NodeId
from helixd.layers import LayerRange
from helixd.plan.cluster.spec import BatchLimits
from helixd.sim.job import Job
from helixd.sim.times import COPY_S_PER_BYTE, LayerTimes
from helixd.sim.wires import Wire
from helixd.sim.world import World


class LayerwiseNode:
    """Queues in front of each layer held. `leave(node, jobs)` takes on the jobs whose last layer here is done."""

    __slots__ = (
        "_at",
        "_copy_s",
        "_entering",
        "_first",
        "_layers",
        "_leave",
        "_limits",
        "_queues",
        "_times",
        "_world",
        "asleep_until_s",
        "batches",
        "busy_s",
        "decode_pass_s",
        "decodes",
        "id",
        "inbound",
        "prompt_s",
        "waiting",
    )  # fmt: skip

    def __init__(
        self, world: World, node: NodeId, held: LayerRange, times: LayerTimes, limits: BatchLimits,
        activation_bytes: float, leave: Callable[["LayerwiseNode", list[Job]], None],
    ) -> None:  # fmt: skip
        self.id = node
        self.asleep_until_s = inf
        self.inbound: list[Wire] = []
        self.busy_s = self.prompt_s = 0.0
        self.batches = self.decodes = 0
        self.decode_pass_s = 0.0
        self.waiting = 0
        self._world = world
        self._first = held.start
        self._layers = len(held)
        self._times = times
        self._limits = limits
        self._copy_s = activation_bytes * COPY_S_PER_BYTE
        self._leave = leave
        self._queues: list[list[Job]] = [[] for _ in range(self._layers)]
        self._entering = 0
        self._at = 0

    def wake(self, at_s: float) -> None:
        """See Receiver."""
        if self.asleep_until_s == at_s:
            self._start()

    def queue_length(self) -> int:
        """Passes that have come and not been computed, those under way on the wires included."""
        return self.waiting + sum(len(wire.queue) for wire in self.inbound)

    def _start(self) -> None:
        self._take_in()
        queues, layers = self._queues, self._layers
        for step in range(layers):
            layer = (self._at + step) % layers
            if queues[layer]:
                break
        else:
            self._sleep()
            return
        self.asleep_until_s = -inf
        self._at = layer
        batch = queues[layer]
        prompts = [job.rows for job in batch if job.rows]
        limits = self._limits
        if (prompts or len(batch) > 100) and _over(limits, batch, prompts):
            batch, queues[layer] = _cut(limits, batch)
            prompts = [job.rows for job in batch if job.rows]
        else:
            queues[layer] = []
        prompt_tokens = sum(prompts)
        decodes = len(batch) - len(prompts)
        prompt_s = self._times.prompt(prompt_tokens)
        took_s = self._times.paper_layer_s(prompt_tokens, decodes)
        if self._entering and layer == 0:
            took_s += self._entering * self._copy_s
            self._entering = 0
        self.busy_s += took_s
        self.prompt_s += prompt_s
        self.batches += 1
        self.decodes += decodes
        self.decode_pass_s += took_s * decodes
        self._world.at(self._world.now_s + took_s, self._done, batch)

    def _done(self, batch: list[Job]) -> None:
        layer = self._at + 1
        if layer < self._layers:
            self._queues[layer].extend(batch)
            self._at = layer
        else:
            self._at = 0
            self.waiting -= len(batch)
            self._leave(self, batch)
        self._start()

    def _take_in(self) -> None:
        now_s = self._world.now_s
        came: list[tuple[float, int, Job]] = []
        for wire in self.inbound:
            queue = wire.queue
            while queue and queue[0][0] <= now_s:
                arrived_s, job, _ = queue.popleft()
                came.append((arrived_s, wire.entry - self._first, job))
        if len(came) > 1:
            came.sort(key=_arrival)
        for _, layer, job in came:
            self._queues[layer].append(job)
            self._entering += job.rows or 1
        self.waiting += len(came)

    def _sleep(self) -> None:
        next_s = min((wire.queue[0][0] for wire in self.inbound if wire.queue), default=inf)
        self.asleep_until_s = next_s
        if next_s < inf:
            self._world.at(next_s, self.wake, next_s)


def _arrival(item: tuple[float, int, Job]) -> float:
    return item[0]


def _over(limits: BatchLimits, batch: list[Job], prompts: list[int]) -> bool:
    """Whether the whole queue is more than one batch may hold."""
    decodes = len(batch) - len(prompts)
    return (
        (limits.prompt_max_requests is not None and len(prompts) > limits.prompt_max_requests)
        or (limits.prompt_max_tokens is not None and sum(prompts) > limits.prompt_max_tokens)
        or (limits.decode_max_tokens is not None and decodes > limits.decode_max_tokens)
        or (
            limits.decode_max_context is not None
            and sum(job.tokens for job in batch if not job.rows) > limits.decode_max_context
        )
    )


def _cut(limits: BatchLimits, queue: list[Job]) -> tuple[list[Job], list[Job]]:
    """The batch, first come first served as far as each kind fits, and the rest in order."""
    batch: list[Job] = []
    rest: list[Job] = []
    prompts, rows, decodes, context = 0, 0, 0, 0
    most_prompts = inf if limits.prompt_max_requests is None else limits.prompt_max_requests
    most_rows = inf if limits.prompt_max_tokens is None else limits.prompt_max_tokens
    most_decodes = inf if limits.decode_max_tokens is None else limits.decode_max_tokens
    most_context = inf if limits.decode_max_context is None else limits.decode_max_context
    for job in queue:
        if job.rows:
            fits = prompts < most_prompts and (rows + job.rows <= most_rows or not prompts)
            if fits:
                prompts += 1
                rows += job.rows
        else:
            fits = decodes < most_decodes and (context + job.tokens <= most_context or not decodes)
            if fits:
                decodes += 1
                context += job.tokens
        (batch if fits else rest).append(job)
    return batch, rest
