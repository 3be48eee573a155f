"""Policy `paper`: the rules of the paper's own simulator, its schedulers and its feeds.

One layer at a time; a sequence's pass returns to the coordinator and is issued again at that instant. The max-flow
scheduler draws whole routes under expected KV use; the others choose hop by hop and know no KV.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import ceil

from helixd.ids import NodeId
from helixd.plan.cluster.spec import COORDINATOR, BatchLimits, ClusterSpec
from helixd.plan.graph.flow import FlowModel
from helixd.plan.plan import Plan
from helixd.route.choosers import HopChooser, RandomHop, ShortestQueue, Swarm
from helixd.sim.job import Job, Request
from helixd.sim.load import Lengths, Load, Offline
from helixd.sim.meter import Meter, Report
from helixd.sim.paper_node import LayerwiseNode
from helixd.sim.paper_schedule import FLOWS, ExpectedKv, FlowDraws, plain_rates, scheduled_flow, shared_rates
from helixd.sim.script import Progress, SimulationStopped
from helixd.sim.tally import Tally
from helixd.sim.times import LayerTimes
from helixd.sim.wires import Wire, make_wires
from helixd.sim.world import World, run_window

SCHEDULERS = ("max-flow", "swarm", "random", "shortest-queue")
LOAD_BYTES_PER_S = 1e9
FEED_S = 0.1
FIRST_REQUESTS = 20
FEED_MARK = 0.8


@dataclass(frozen=True, slots=True)
class PaperPolicy:
    """`scheduler` is one of SCHEDULERS. `flow`, `flow_seed`: which of the max flows (see `paper_schedule`)."""

    scheduler: str = "max-flow"
    flow: str = "even"
    flow_seed: int | None = None

    @property
    def name(self) -> str:
        """For tables."""
        return f"paper/{self.scheduler}"

    def run(
        self, spec: ClusterSpec, plan: Plan, load: Load, lengths: Lengths, *, seed: int = 0,
        progress: Progress | None = None,
    ) -> Report:  # fmt: skip
        """Simulate the plan's placement.

        Raises SimulationStopped where an arriving request finds no room, ValueError for an unknown scheduler or flow.
        """
        for what, name, known in (("scheduler", self.scheduler, SCHEDULERS), ("flow", self.flow, FLOWS)):
            if name not in known:
                raise ValueError(f"{what} {name!r} is none of {', '.join(known)}")
        return _Run(self, spec, plan, load, lengths, seed).report(progress)


class _Run:
    def __init__(
        self, policy: PaperPolicy, spec: ClusterSpec, plan: Plan, load: Load, lengths: Lengths, seed: int
    ) -> None:
        self.world = World()
        self.policy, self.load, self.lengths, self.seed = policy, load, lengths, seed
        self.requests = lengths.draws(seed)
        self.count = 0
        placement = plan.placement
        by_flow = policy.scheduler == "max-flow"
        edges = FlowModel(spec).edges(placement)
        entries = {edge: 0 if edge[0] == COORDINATOR else placement[edge[0]].end for edge in edges}
        flow = scheduled_flow(spec, placement, kind=policy.flow, seed=policy.flow_seed)
        rates = shared_rates(spec, flow, edges) if by_flow else plain_rates(spec, edges)
        self.wires = make_wires(self.world, spec, rates, entries)
        self.nodes = {
            node.id: LayerwiseNode(
                self.world, node.id, placement[node.id], LayerTimes(node.profile),
                _limits(node.profile.batch_limits, len(placement[node.id])), spec.model.activation_bytes, self._leave,
            )
            for node in spec.nodes
            if node.id in placement
        }  # fmt: skip
        self.out: dict[NodeId, list[Wire]] = {}
        for (src, dst), wire in self.wires.items():
            self.out.setdefault(src, []).append(wire)
            if dst == COORDINATOR:
                wire.deliver = self._returned
            else:
                wire.receiver = self.nodes[dst]
                self.nodes[dst].inbound.append(wire)
        self.kv = ExpectedKv(spec, placement, offline=isinstance(load, Offline))
        self.draws = FlowDraws(spec, placement, flow, self.kv, self.wires) if by_flow else None
        self.chooser = _chooser(policy.scheduler, self.nodes, seed)
        loading_s = max(len(held) * spec.model.layer_bytes / LOAD_BYTES_PER_S for held in placement.values())
        self.start_s = ceil(loading_s) + 1.0
        begin_s = self.start_s + load.warmup_s
        self.meter = Meter(begin_s, begin_s + load.measure_s)
        self.tally = Tally(self.world, self.nodes.values(), self.wires.values(), self.kv.fill)

    def report(self, progress: Progress | None) -> Report:
        self._feed_first()
        run_window(self.world, self.meter.start_s, self.meter.end_s, self.tally.begin, progress)
        return self.meter.report(self.policy.name, self.tally, self.world.events)

    # -- feeding -----------------------------------------------------------------------------------------------------

    def _feed_first(self) -> None:
        if not isinstance(self.load, Offline):
            self._next_arrival(self.load.arrivals(self.lengths, self.seed))
            return
        first = FIRST_REQUESTS if self.load.in_flight is None else self.load.in_flight
        for i in range(first):
            self.world.at(self.start_s + i * FEED_S, self._issue_next)

    def _next_arrival(self, arrivals: Iterator[tuple[float, Request]]) -> None:
        found = next(arrivals, None)
        if found is not None:
            self.world.at(self.start_s + found[0], self._arrived, (found[1], arrivals))

    def _arrived(self, argument: tuple[Request, Iterator[tuple[float, Request]]]) -> None:
        self._issue(argument[0])
        self._next_arrival(argument[1])

    def _feed_after(self, *, finished: bool) -> None:
        """Offline one more request follows, 0.1 s later: with a number in flight to keep, after each that finished."""
        if not isinstance(self.load, Offline):
            return
        kept = self.load.in_flight is not None
        if finished if kept else self.kv.fullest() <= FEED_MARK:
            self.world.at(self.world.now_s + FEED_S, self._issue_next)

    def _issue_next(self, _: None) -> None:
        self._issue(next(self.requests))

    def _issue(self, request: Request) -> None:
        now_s = self.world.now_s
        self.count += 1
        job = Job(self.count, request, now_s, request.input_tokens)
        if self.draws is None:
            job.wires = [self._choose(COORDINATOR, job)]
        else:
            wires = self.draws.draw(job)
            if wires is None:
                if not isinstance(self.load, Offline):
                    raise SimulationStopped(
                        f"request {job.number} of {request.input_tokens} tokens finds no pipeline with room "
                        f"{now_s - self.start_s:.1f} s after the start: the paper's simulator ends here; policy helixd "
                        "would let it wait"
                    )
                self.meter.dropped += 1
                return
            job.wires = wires
        self.meter.started += 1
        self.meter.flying(now_s, +1)
        job.sent_s = now_s
        job.wires[0].send(job, job.rows)

    # -- passing on --------------------------------------------------------------------------------------------------

    def _leave(self, node: LayerwiseNode, batch: list[Job]) -> None:
        for job in batch:
            if job.rows and self.draws is None:
                came = job.wires[job.hop]
                self.chooser.measured(came.src, came.dst, self.world.now_s - job.first_s)
                job.wires.append(self._choose(node.id, job))
            job.hop += 1
            job.wires[job.hop].send(job, job.rows)

    def _choose(self, vertex: NodeId, job: Job) -> Wire:
        wires = self.out[vertex]
        job.first_s = self.world.now_s
        if len(wires) == 1:
            return wires[0]
        hops = [wire.dst for wire in wires]
        chosen = self.chooser.choose(vertex, hops, job.rows)
        self.chooser.charge(vertex, chosen, hops, job.rows)
        return self.wires[vertex, chosen]

    def _returned(self, job: Job) -> None:
        now_s = self.world.now_s
        if job.rows:
            self.meter.prompted(now_s, now_s - job.created_s, job.rows)
            job.rows = 0
            job.first_s = now_s
            self._feed_after(finished=False)
        else:
            job.emitted += 1
            self.meter.decoded(now_s, now_s - job.sent_s)
        if job.emitted >= job.request.output_tokens:
            self.kv.release(job)
            self.meter.flying(now_s, -1)
            self.meter.done(now_s, job.created_s, job.first_s, job.emitted)
            self._feed_after(finished=True)
            return
        if self.draws is not None:
            self.draws.follow(job)
        job.hop = 0
        job.sent_s = now_s
        job.wires[0].send(job, 0)


def _limits(limits: tuple[BatchLimits, ...], layers: int) -> BatchLimits:
    return limits[layers - 1] if len(limits) >= layers else BatchLimits()


def _chooser(scheduler: str, nodes: Mapping[NodeId, LayerwiseNode], seed: int) -> HopChooser:
    if scheduler == "random":
        return RandomHop(seed)
    if scheduler == "shortest-queue":
        return ShortestQueue(lambda node: nodes[node].queue_length() if node != COORDINATOR else 0.0, seed)
    return Swarm()
