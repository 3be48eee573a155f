"""Policy `paper`: the rules of the paper's own simulator, its schedulers and its feeds.

One layer at a time; a sequence's pass returns to the coordinator and is issued again at that instant. The max-flow
scheduler draws whole routes under expected KV use; the others choose hop by hop and know no KV.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import ceil

from helixd.errors import HelixError
from helixd.ids import NodeId
from helixd.layers import LayerRange
from helixd.plan.flow import Flow, FlowModel
from helixd.plan.spec import COORDINATOR, ClusterSpec
from helixd.route.choosers import HopChooser, RandomHop, ShortestQueue, Swarm
from helixd.sim.job import Job, Request
from helixd.sim.load import Lengths, Load, Offline
from helixd.sim.meter import Meter, NodeReport, Report
from helixd.sim.paper_node import LayerwiseNode
from helixd.sim.times import LayerTimes
from helixd.sim.wires import Edge, Wire, make_wires
from helixd.sim.world import World

Placement = Mapping[NodeId, LayerRange]

SCHEDULERS = ("max-flow", "swarm", "random", "shortest-queue")
LOAD_BYTES_PER_S = 1e9
FEED_S = 0.1
FIRST_REQUESTS = 20
FEED_MARK = 0.8
LEAST_SHARE = 0.05
SEL = 1
EXPECTED_OUTPUT = 240


class SimulationStopped(HelixError):
    """The paper's simulator ends a run here: online, a request finds no pipeline with room."""


@dataclass(frozen=True, slots=True)
class PaperPolicy:
    """`scheduler` is one of SCHEDULERS. `drop_online`: go on without a request that finds no room, online too."""

    scheduler: str = "max-flow"
    drop_online: bool = False

    @property
    def name(self) -> str:
        """For tables."""
        return f"paper/{self.scheduler}"

    def run(self, spec: ClusterSpec, placement: Placement, load: Load, lengths: Lengths, seed: int) -> Report:
        """Simulate. Raises SimulationStopped, ValueError for an unknown scheduler."""
        if self.scheduler not in SCHEDULERS:
            raise ValueError(f"scheduler {self.scheduler!r} is none of {', '.join(SCHEDULERS)}")
        return _Run(spec, placement, load, lengths, seed, self).report()


class _Run:
    def __init__(
        self, spec: ClusterSpec, placement: Placement, load: Load, lengths: Lengths, seed: int, policy: PaperPolicy
    ) -> None:
        self.world = World()
        self.placement = placement
        self.load = load
        self.lengths = lengths
        self.seed = seed
        self.requests = lengths.draws(seed)
        flow = _flow(spec, placement)
        self.scheduled = policy.scheduler == "max-flow"
        edges = FlowModel(spec).edges(placement)
        rates = _shared_rates(spec, flow, edges) if self.scheduled else _plain_rates(spec, edges)
        entries = {edge: 0 if edge[0] == COORDINATOR else placement[edge[0]].end for edge in edges}
        self.wires = make_wires(self.world, spec, rates, entries)
        self.nodes = {
            node.id: LayerwiseNode(
                self.world, node.id, placement[node.id], LayerTimes(node.profile),
                node.profile.batch_limits[len(placement[node.id]) - 1], spec.model.activation_bytes, self._leave,
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
        self.kv = _ExpectedKv(spec, placement, offline=isinstance(load, Offline))
        self.draws = _FlowDraws(spec, placement, flow, self.kv, self.wires) if self.scheduled else None
        self.chooser = _chooser(policy.scheduler, self.nodes, seed)
        loading_s = max(len(held) * spec.model.layer_bytes / LOAD_BYTES_PER_S for held in placement.values())
        self.start_s = ceil(loading_s) + 1.0
        begin_s = self.start_s + load.warmup_s
        self.meter = Meter(begin_s, begin_s + load.measure_s)
        self.policy = policy
        self.count = 0
        self.asked = 0

    def report(self) -> Report:
        self._feed_first()
        self.world.run(self.meter.start_s)
        before = {node.id: (node.busy_s, node.prompt_s, node.batches, node.decodes) for node in self.nodes.values()}
        self.world.run(self.meter.end_s)
        window_s = self.meter.end_s - self.meter.start_s
        nodes = {
            node.id: NodeReport(
                (node.busy_s - before[node.id][0]) / window_s, (node.prompt_s - before[node.id][1]) / window_s,
                node.batches - before[node.id][2],
                (node.decodes - before[node.id][3]) / max(1, node.batches - before[node.id][2]),
                self.kv.share(node.id), self.kv.peak(node.id),
            )
            for node in self.nodes.values()
        }  # fmt: skip
        return self.meter.report(self.policy.name, nodes, {}, self.world.events)

    # -- feeding -----------------------------------------------------------------------------------------------------

    def _feed_first(self) -> None:
        if not isinstance(self.load, Offline):
            arrivals = self.load.arrivals(self.lengths, self.seed)
            self._next_arrival(arrivals)
            return
        first = FIRST_REQUESTS if self.scheduled and self.load.in_flight is None else self.load.in_flight or 180
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
        if not isinstance(self.load, Offline):
            return
        if self.scheduled and self.load.in_flight is None:
            if self.kv.fullest() <= FEED_MARK:
                self.world.at(self.world.now_s + FEED_S, self._issue_next)
        elif finished:
            self.world.at(self.world.now_s + FEED_S, self._issue_next)

    def _issue_next(self, _: None) -> None:
        self._issue(next(self.requests))

    def _issue(self, request: Request) -> None:
        now_s = self.world.now_s
        self.count += 1
        job = Job(self.count, request, now_s, request.input_tokens)
        if self.draws is not None:
            wires = self.draws.draw(job)
            if wires is None:
                if not isinstance(self.load, Offline) and not self.policy.drop_online:
                    raise SimulationStopped(
                        f"request {job.number} of {request.input_tokens} tokens finds no pipeline with room "
                        f"at {now_s - self.start_s:.1f} s"
                    )
                self.meter.dropped += 1
                return
            job.wires = wires
        else:
            job.wires = [self._choose(COORDINATOR, job)]
        self.meter.started += 1
        self.meter.flying(now_s, +1)
        job.sent_s = now_s
        job.wires[0].send(job, job.rows)

    # -- passing on --------------------------------------------------------------------------------------------------

    def _leave(self, node: LayerwiseNode, batch: list[Job]) -> None:
        for job in batch:
            if job.rows and self.draws is None:
                now_s = self.world.now_s
                came = job.wires[job.hop]
                self.chooser.measured(came.src, came.dst, now_s - job.first_s)
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


class _ExpectedKv:
    """What the scheduler expects to be kept on each node, in tokens x layers."""

    def __init__(self, spec: ClusterSpec, placement: Placement, *, offline: bool) -> None:
        self._ratio = 1.0 if offline else 0.6
        self._mark = 0.85 if offline else 0.9
        self._used = dict.fromkeys(placement, 0.0)
        self._peak = dict.fromkeys(placement, 0.0)
        self._room = {
            node.id: node.profile.kv_capacity_token_layers[len(placement[node.id]) - 1]
            for node in spec.nodes
            if node.id in placement
        }
        self._layers = {node: len(held) for node, held in placement.items()}
        self._held: dict[int, list[tuple[NodeId, float]]] = {}

    def expected(self, request: Request) -> int:
        return int(request.input_tokens + EXPECTED_OUTPUT * self._ratio)

    def fits(self, node: NodeId, tokens: int) -> bool:
        return self._used[node] + tokens * self._layers[node] <= self._mark * self._room[node]

    def reserve(self, job: Job, hops: list[tuple[NodeId, int]], tokens: int) -> None:
        self._held[job.number] = [(node, float(layers * tokens)) for node, layers in hops]
        for node, size in self._held[job.number]:
            self._used[node] += size
            self._peak[node] = max(self._peak[node], self._used[node])

    def release(self, job: Job) -> None:
        for node, size in self._held.pop(job.number, ()):
            self._used[node] -= size

    def share(self, node: NodeId) -> float:
        return self._used[node] / self._room[node]

    def peak(self, node: NodeId) -> float:
        return self._peak[node] / self._room[node]

    def fullest(self) -> float:
        return max(used / self._room[node] for node, used in self._used.items())


class _FlowDraws:
    """The paper's max-flow scheduler: at every vertex the hop with the least work per flow so far."""

    def __init__(
        self, spec: ClusterSpec, placement: Placement, flow: Flow, kv: _ExpectedKv, wires: Mapping[Edge, Wire]
    ) -> None:
        self._placement = placement
        self._kv = kv
        self._wires = wires
        out: dict[NodeId, dict[NodeId, float]] = {}
        for (src, dst), tokens_per_s in flow.edges.items():
            out.setdefault(src, {})[dst] = tokens_per_s
        self._flow = {
            src: {dst: rate for dst, rate in hops.items() if rate >= LEAST_SHARE * sum(hops.values())}
            for src, hops in out.items()
        }
        self._load: dict[Edge, float] = {(src, dst): 0.0 for src, hops in self._flow.items() for dst in hops}
        self._longest = {
            node.id: node.profile.batch_limits[len(placement[node.id]) - 1].prompt_max_tokens
            for node in spec.nodes
            if node.id in placement
        }

    def draw(self, job: Job) -> list[Wire] | None:
        rows = job.rows
        tokens = self._kv.expected(job.request)
        vertex, entry = COORDINATOR, 0
        wires: list[Wire] = []
        hops: list[tuple[NodeId, int]] = []
        while True:
            best, least = None, float("inf")
            for hop, rate in self._flow[vertex].items():
                if hop != COORDINATOR:
                    longest = self._longest[hop]
                    if (longest is not None and rows > longest) or not self._kv.fits(hop, tokens):
                        continue
                load = self._load[vertex, hop] + SEL * rows / rate
                if load < least:
                    best, least = hop, load
            if best is None:
                return None
            self._load[vertex, best] += rows / self._flow[vertex][best]
            wires.append(self._wires[vertex, best])
            if best == COORDINATOR:
                break
            end = self._placement[best].end
            hops.append((best, end - entry))
            vertex, entry = best, end
        self._kv.reserve(job, hops, tokens)
        return wires

    def follow(self, job: Job) -> None:
        load, flow = self._load, self._flow
        for wire in job.wires:
            load[wire.src, wire.dst] += 1 / flow[wire.src][wire.dst]


def _flow(spec: ClusterSpec, placement: Placement) -> Flow:
    """The scheduler's max flow: every link carries bandwidth / (token + activation bytes)."""
    size = spec.model.token_bytes + spec.model.activation_bytes
    import os
    return FlowModel(replace(spec, model=replace(spec.model, activation_bytes=size))).solve(placement, spread=not os.environ.get("NOSPREAD"))
    return FlowModel(replace(spec, model=replace(spec.model, token_bytes=size, activation_bytes=size))).solve(placement, spread=False)


def _plain_rates(spec: ClusterSpec, edges: Mapping[Edge, float]) -> dict[Edge, float]:
    bandwidth = {(link.src, link.dst): link.bandwidth_bytes_per_s for link in spec.links}
    return {edge: bandwidth[edge] for edge in edges}


def _shared_rates(spec: ClusterSpec, flow: Flow, edges: Mapping[Edge, float]) -> dict[Edge, float]:
    """A link's fixed rate: its own, and its share by flow of the NICs at its ends."""
    nic_out = {node.id: node.nic_out_bytes_per_s for node in spec.nodes}
    nic_in = {node.id: node.nic_in_bytes_per_s for node in spec.nodes}
    nic_out[COORDINATOR] = spec.coordinator_nic_out_bytes_per_s
    nic_in[COORDINATOR] = spec.coordinator_nic_in_bytes_per_s
    leaving: dict[NodeId, float] = {}
    coming: dict[NodeId, float] = {}
    for (src, dst), tokens_per_s in flow.edges.items():
        leaving[src] = leaving.get(src, 0.0) + tokens_per_s
        coming[dst] = coming.get(dst, 0.0) + tokens_per_s
    rates = _plain_rates(spec, edges)
    for edge in edges:
        src, dst = edge
        carried = flow.edges.get(edge, 0.0)
        if carried <= 0:
            continue
        send, receive = nic_out[src], nic_in[dst]
        if send is not None:
            rates[edge] = min(rates[edge], send * carried / leaving[src])
        if receive is not None:
            rates[edge] = min(rates[edge], receive * carried / coming[dst])
    return rates


def _chooser(scheduler: str, nodes: Mapping[NodeId, LayerwiseNode], seed: int) -> HopChooser:
    if scheduler == "random":
        return RandomHop(seed)
    if scheduler == "shortest-queue":
        return ShortestQueue(lambda node: nodes[node].queue_length() if node != COORDINATOR else 0.0, seed)
    return Swarm()
