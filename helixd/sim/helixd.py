"""Policy `helixd`: what our coordinator and workers do, with the real router, ledger, admission and expectation.

Whole-range stages, decode first, prefill in chunks; KV reserved by expectation and preempted by recompute; a queue in
front of prefill. A request is one prompt pass and `output_tokens` decode passes, as in the paper's simulator.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from helixd.errors import NoRoute
from helixd.ids import Attempt, NodeId, SequenceId
from helixd.layers import LayerRange
from helixd.plan.plan import Plan
from helixd.plan.spec import COORDINATOR, ClusterSpec
from helixd.route.admission import AdmissionQueue
from helixd.route.choosers import FixedRoundRobin, FlowShares, HopChooser, RandomHop, ShortestQueue, Swarm
from helixd.route.expectation import OutputLength
from helixd.route.router import SLACK_TOKENS, Router
from helixd.sim.job import Job, Request
from helixd.sim.load import Lengths, Load, Offline
from helixd.sim.meter import Meter, NodeReport, Report
from helixd.sim.stage_node import StageNode, StepLimits
from helixd.sim.times import LayerTimes
from helixd.sim.wires import Edge, make_wires
from helixd.sim.world import World

BACKLOG = 4
COUNTED_TOGETHER = 16
"""Decode steps are told to the router in lots: the same sum in a sixteenth of the time."""
CHOOSERS = ("flow", "swarm", "random", "shortest-queue", "round-robin")


@dataclass(frozen=True, slots=True)
class HelixdPolicy:
    """The engine's and the coordinator's options. `prefill_tokens`: prompt tokens that may be in prefill at once.

    `feedback`: the last stage sends the token to the first directly where there is a link, not by the coordinator.
    """

    limits: StepLimits = StepLimits()
    kv_mark: float = 0.9
    prefill_tokens: int | None = None
    feedback: bool = False
    chooser: str = "flow"
    slack_tokens: float = SLACK_TOKENS
    prior_output_tokens: float | None = None

    @property
    def name(self) -> str:
        """For tables."""
        return "helixd" if self.chooser == "flow" else f"helixd/{self.chooser}"

    def run(self, spec: ClusterSpec, plan: Plan, load: Load, lengths: Lengths, seed: int) -> Report:
        """Simulate. Raises ValueError for an unknown chooser."""
        if self.chooser not in CHOOSERS:
            raise ValueError(f"chooser {self.chooser!r} is none of {', '.join(CHOOSERS)}")
        return _Run(spec, plan, load, lengths, seed, self).report()


class _Run:
    def __init__(
        self, spec: ClusterSpec, plan: Plan, load: Load, lengths: Lengths, seed: int, policy: HelixdPolicy
    ) -> None:
        self.world = world = World()
        self.plan, self.load, self.lengths, self.seed, self.policy = plan, load, lengths, seed, policy
        self.requests = lengths.draws(seed)
        placement = plan.placement
        self.nodes = {
            node.id: StageNode(
                world, node.id, placement[node.id], LayerTimes(node.profile), policy.limits, spec.model.activation_bytes
            )
            for node in spec.nodes
            if node.id in placement
        }
        bandwidth = {(link.src, link.dst): link.bandwidth_bytes_per_s for link in spec.links}
        edges = [(src, hop.node) for src, hops in plan.schedule.items() for hop in hops]
        entries = {edge: 0 if edge[0] == COORDINATOR else placement[edge[0]].end for edge in edges}
        self.wires = make_wires(world, spec, {edge: bandwidth[edge] for edge in edges}, entries)
        for (_, dst), wire in self.wires.items():
            if dst == COORDINATOR:
                wire.deliver = self._token
            else:
                self.nodes[dst].connect(wire)
        self.feedback = make_wires(world, spec, _feedback_edges(plan, bandwidth) if policy.feedback else {}, {})
        for (_, dst), wire in self.feedback.items():
            wire.row_s *= spec.model.token_bytes / spec.model.activation_bytes
            self.nodes[dst].connect(wire)
        room = plan.kv_capacity_token_layers or {
            node.id: node.profile.kv_capacity_token_layers[len(placement[node.id]) - 1]
            for node in spec.nodes
            if node.id in placement
        }
        self.router = Router(
            plan, {node: int(size) for node, size in room.items()}, high_water=policy.kv_mark, chooser=self._chooser()
        )
        self.expect = OutputLength(policy.prior_output_tokens or spec.workload.mean_output_tokens)
        self.queue: AdmissionQueue[Job] = AdmissionQueue(1 << 30)
        self.meter = Meter(load.warmup_s, load.warmup_s + load.measure_s)
        self.flying: dict[SequenceId, Job] = {}
        self.routes: dict[SequenceId, object] = {}
        self.prefilling = 0
        self.count = 0
        self.kv_area: dict[NodeId, float] = dict.fromkeys(self.nodes, 0.0)
        self.kv_peak: dict[NodeId, float] = dict.fromkeys(self.nodes, 0.0)
        self.kv_samples = 0

    def _chooser(self) -> HopChooser:
        match self.policy.chooser:
            case "swarm":
                return Swarm()
            case "random":
                return RandomHop(self.seed)
            case "shortest-queue":
                return ShortestQueue(
                    lambda node: self.nodes[node].queue_length() if node != COORDINATOR else 0.0, self.seed
                )
            case "round-robin":
                return FixedRoundRobin()
        return FlowShares(self.plan.schedule, COORDINATOR, slack_tokens=self.policy.slack_tokens)

    def report(self) -> Report:
        if isinstance(self.load, Offline):
            self._top_up()
        else:
            self._next_arrival(self.load.arrivals(self.lengths, self.seed))
        self.world.run(self.meter.start_s)
        before = {node.id: (node.busy_s, node.prompt_s, node.batches, node.decodes) for node in self.nodes.values()}
        self._sample_kv(None)
        self.world.run(self.meter.end_s)
        window_s = self.meter.end_s - self.meter.start_s
        nodes = {
            node.id: NodeReport(
                (node.busy_s - before[node.id][0]) / window_s, (node.prompt_s - before[node.id][1]) / window_s,
                node.batches - before[node.id][2],
                (node.decodes - before[node.id][3]) / max(1, node.batches - before[node.id][2]),
                self.kv_area[node.id] / max(1, self.kv_samples), self.kv_peak[node.id],
            )
            for node in self.nodes.values()
        }  # fmt: skip
        return self.meter.report(self.policy.name, nodes, {}, self.world.events)

    def _sample_kv(self, _: None) -> None:
        self.kv_samples += 1
        ledger = self.router.ledger
        for node in self.nodes:
            share = ledger.used(node) / max(1, ledger.capacity(node))
            self.kv_area[node] += share
            self.kv_peak[node] = max(self.kv_peak[node], share)
        self.world.at(self.world.now_s + 1.0, self._sample_kv)

    # -- arrivals and admission --------------------------------------------------------------------------------------

    def _next_arrival(self, arrivals: Iterator[tuple[float, Request]]) -> None:
        found = next(arrivals, None)
        if found is not None:
            self.world.at(found[0], self._arrived, (found[1], arrivals))

    def _arrived(self, argument: tuple[Request, Iterator[tuple[float, Request]]]) -> None:
        request, arrivals = argument
        self._push(request)
        self._admit()
        self._next_arrival(arrivals)

    def _push(self, request: Request) -> None:
        now_s = self.world.now_s
        self.count += 1
        if not self.router.fits_when_empty(request.input_tokens):
            self.meter.dropped += 1
            return
        job = Job(self.count, request, now_s, request.input_tokens)
        self.queue.push(job, now_s=now_s)
        self.meter.queued(now_s, +1)

    def _top_up(self) -> None:
        """Offline there is always a next request: admit as many as get in."""
        load = self.load
        assert isinstance(load, Offline)
        while True:
            while len(self.queue) < BACKLOG:
                self._push(next(self.requests))
            if not self._admit_waiting():
                return

    def _admit(self) -> None:
        if isinstance(self.load, Offline):
            self._top_up()
        elif len(self.queue):
            self._admit_waiting()

    def _admit_waiting(self) -> int:
        admitted = self.queue.admit(self.world.now_s, self._try)
        self.meter.queued(self.world.now_s, -len(admitted))
        return len(admitted)

    def _try(self, job: Job) -> bool:
        limit = self.policy.prefill_tokens
        if limit is not None and self.prefilling and self.prefilling + job.rows > limit:
            return False
        if isinstance(self.load, Offline) and self.load.in_flight is not None:
            if len(self.flying) >= self.load.in_flight:
                return False
        sequence = SequenceId(job.number)
        expected = self.expect.expect(2048, emitted=job.emitted)
        try:
            route = self.router.draw(sequence, job.rows, expected, attempt=Attempt(job.attempt))
        except NoRoute:
            return False
        job.wires = [self.wires[link] for link in route.links]
        self.routes[sequence] = route
        self.flying[sequence] = job
        self.prefilling += job.rows
        if self.policy.feedback:
            job.feedback = self.feedback.get((route.nodes[-1], route.nodes[0]))
            job.drawn = job.emitted
        now_s = self.world.now_s
        self.meter.started += job.attempt == 0
        self.meter.flying(now_s, +1)
        job.sent_s = now_s
        job.hop = 0
        job.wires[0].send(job, job.rows)
        return True

    # -- tokens ------------------------------------------------------------------------------------------------------

    def _token(self, job: Job) -> None:
        if not job.alive:
            return
        now_s = self.world.now_s
        sequence = SequenceId(job.number)
        if job.rows:
            self.prefilling -= job.rows
            if job.attempt == 0:
                job.first_s = now_s
                self.meter.prompted(now_s, now_s - job.created_s, job.rows)
            else:
                job.emitted += 1
            job.rows = 0
            self.router.prefilled(sequence, Attempt(job.attempt))
            changed = True
        else:
            job.emitted += 1
            self.meter.decoded(now_s, now_s - job.sent_s)
            changed = False
        if job.emitted >= job.request.output_tokens:
            self.meter.done(now_s, job.created_s, job.first_s, job.emitted)
            self.expect.observe(job.emitted)
            self._drop(job)
            self._admit()
            return
        if job.emitted % COUNTED_TOGETHER == 0:
            self.router.count_decode(self.routes[sequence], COUNTED_TOGETHER)
        over = self.router.ledger.grow(sequence, job.tokens + 1, attempt=Attempt(job.attempt))
        job.sent_s = now_s
        if job.feedback is None:
            job.hop = 0
            job.wires[0].send(job, 0)
        for node in over:
            changed |= self._relieve(node)
        if changed:
            self._admit()

    def _drop(self, job: Job) -> None:
        """A sequence's route ends: finished, or to begin again."""
        sequence = SequenceId(job.number)
        job.alive = False
        if job.rows:
            self.prefilling -= job.rows
        del self.flying[sequence], self.routes[sequence]
        self.router.release(sequence)
        self.meter.flying(self.world.now_s, -1)

    def _relieve(self, node: NodeId) -> bool:
        """The youngest sequence on an overfull node begins again, unless it is the only one there."""
        ledger = self.router.ledger
        if ledger.used(node) <= ledger.capacity(node):
            return False
        here = ledger.holders(node)
        if len(here) < 2:
            return False
        self._begin_again(self.flying[max(sequence for sequence, _ in here)])
        self.meter.preempted += 1
        return True

    def _begin_again(self, job: Job) -> None:
        self._drop(job)
        again = Job(
            job.number, job.request, job.created_s, job.request.input_tokens + job.emitted, job.emitted,
            first_s=job.first_s, attempt=job.attempt + 1,
        )  # fmt: skip
        self.queue.push(again, now_s=self.world.now_s, priority=(1 << 30) - job.number)
        self.meter.queued(self.world.now_s, +1)


def _feedback_edges(plan: Plan, bandwidth: Mapping[Edge, float]) -> dict[Edge, float]:
    """Links from nodes that hold the last layer to nodes that hold the first."""
    first = [hop.node for hop in plan.schedule[COORDINATOR]]
    last = [node for node, hops in plan.schedule.items() if any(hop.node == COORDINATOR for hop in hops)]
    return {(a, b): bandwidth[a, b] for a in last for b in first if bandwidth.get((a, b), 0.0) > 0}
