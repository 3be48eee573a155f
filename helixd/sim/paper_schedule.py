"""The max-flow scheduler of the paper's simulator: its flow, its fixed link rates, its expected KV, its draws.

Of all max flows its own is unknown, and throughput depends on which it is: by tens of percent where many hops are
alternatives. FLOWS are three ways to come by one: "even" shares load over equal alternatives, "paths" fills paths one
by one, "preflow" pushes preflows as the paper's library does, with arcs in an order that a seed shuffles.
"""

from collections.abc import Mapping
from dataclasses import replace
from random import Random

from helixd.ids import NodeId
from helixd.layers import LayerRange
from helixd.plan.cluster.spec import COORDINATOR, ClusterSpec
from helixd.plan.graph.flow import Flow, FlowModel, node_capacity
from helixd.sim.job import Job, Request
from helixd.sim.preflow import preflow_push
from helixd.sim.wires import Edge, Wire

Placement = Mapping[NodeId, LayerRange]

FLOWS = ("even", "paths", "preflow")
LEAST_SHARE = 0.05
EXPECTED_OUTPUT = 240


def scheduled_flow(spec: ClusterSpec, placement: Placement, *, kind: str, seed: int | None = None) -> Flow:
    """A max flow in which a link between nodes carries bandwidth / (token + activation bytes). `kind` is one of FLOWS.

    `seed` shuffles the arcs of a "preflow"; None leaves them in the order of the cluster file.
    """
    size = spec.model.token_bytes + spec.model.activation_bytes
    sized = replace(spec, model=replace(spec.model, activation_bytes=size))
    if kind == "preflow":
        return _pushed(sized, placement, seed)
    return FlowModel(sized).solve(placement, spread=kind == "even")


def _pushed(spec: ClusterSpec, placement: Placement, seed: int | None) -> Flow:
    """Vertices: 0 source, 1 sink, 2 + 2 i and 3 + 2 i in and out of node i."""
    nodes = {node.id: node for node in spec.nodes}
    names = sorted(placement, key=list(nodes).index)
    rooms = FlowModel(spec).edges(placement)
    edges = [(link.src, link.dst) for link in spec.links if (link.src, link.dst) in rooms]
    if seed is not None:
        chance = Random(seed)  # noqa: S311
        chance.shuffle(names)
        chance.shuffle(edges)
    inside = {node: 2 + 2 * i for i, node in enumerate(names)}
    arcs = [(at, at + 1, node_capacity(spec, nodes[node], len(placement[node]))) for node, at in inside.items()]
    for edge in edges:
        tail = 0 if edge[0] == COORDINATOR else inside[edge[0]] + 1
        arcs.append((tail, 1 if edge[1] == COORDINATOR else inside[edge[1]], rooms[edge]))
    flows = preflow_push(2 + 2 * len(names), arcs, 0, 1)
    floor = 1e-9 * max(flows)
    through = {node: flow for node, flow in zip(names, flows, strict=False) if flow > floor}
    carried = {edge: flow for edge, flow in zip(edges, flows[len(names) :], strict=True) if flow > floor}
    value = sum(flow for (src, _), flow in carried.items() if src == COORDINATOR)
    return Flow(value, carried, through, frozenset(), frozenset())


class ExpectedKv:
    """What the scheduler expects to be kept on each node, in tokens x layers."""

    def __init__(self, spec: ClusterSpec, placement: Placement, *, offline: bool) -> None:
        self._ratio = 1.0 if offline else 0.6
        self._mark = 0.85 if offline else 0.9
        self._used = dict.fromkeys(placement, 0.0)
        self._room = {
            node.id: node.profile.kv_capacity_token_layers[len(placement[node.id]) - 1]
            for node in spec.nodes
            if node.id in placement
        }
        self._layers = {node: len(held) for node, held in placement.items()}
        holders = {
            tuple(node for node, held in placement.items() if layer in held)
            for layer in range(max(held.end for held in placement.values()))
        }
        # Who holds some layer together, and how many tokens have room there.
        self._holders = [(nodes, sum(self._room[n] / self._layers[n] for n in nodes)) for nodes in sorted(holders)]
        self._held: dict[int, list[tuple[NodeId, float]]] = {}

    def expected(self, request: Request) -> int:
        """Tokens that a request is taken to grow to."""
        return int(request.input_tokens + EXPECTED_OUTPUT * self._ratio)

    def fits(self, node: NodeId, tokens: int) -> bool:
        """Whether a sequence of so many tokens may come to `node`: charged for all its layers."""
        return self._used[node] + tokens * self._layers[node] <= self._mark * self._room[node]

    def reserve(self, job: Job, hops: list[tuple[NodeId, int]], tokens: int) -> None:
        """Charge a drawn sequence for the layers it uses on every hop."""
        self._held[job.number] = [(node, float(layers * tokens)) for node, layers in hops]
        for node, size in self._held[job.number]:
            self._used[node] += size

    def release(self, job: Job) -> None:
        """The sequence is over."""
        for node, size in self._held.pop(job.number, ()):
            self._used[node] -= size

    def fill(self, node: NodeId) -> float:
        """The share of a node's room that is expected to be used; 1 for a node without room."""
        return self._used[node] / self._room[node] if self._room[node] else 1.0

    def fullest(self) -> float:
        """The share of the fullest layer that is expected to be used, on all nodes that hold it together.

        Each node counts in every layer with its mean over the layers that it holds.
        """
        return max(
            sum(self._used[n] / self._layers[n] for n in nodes) / room if room else 1.0 for nodes, room in self._holders
        )


class FlowDraws:
    """The paper's max-flow scheduler: at every vertex the hop with the least work per flow so far."""

    def __init__(
        self, spec: ClusterSpec, placement: Placement, flow: Flow, kv: ExpectedKv, wires: Mapping[Edge, Wire]
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
            if node.id in placement and len(node.profile.batch_limits) >= len(placement[node.id])
        }

    def draw(self, job: Job) -> list[Wire] | None:
        """The wires of a route, its KV reserved; None if some vertex has no candidate."""
        rows = job.rows
        tokens = self._kv.expected(job.request)
        vertex, entry = COORDINATOR, 0
        wires: list[Wire] = []
        hops: list[tuple[NodeId, int]] = []
        while True:
            best, least = None, float("inf")
            for hop, rate in self._flow[vertex].items():
                if hop != COORDINATOR:
                    longest = self._longest.get(hop)
                    if (longest is not None and rows > longest) or not self._kv.fits(hop, tokens):
                        continue
                load = self._load[vertex, hop] + rows / rate
                if load < least:
                    best, least = hop, load
            if best is None:
                for wire in wires:
                    self._load[wire.src, wire.dst] -= rows / self._flow[wire.src][wire.dst]
                return None
            self._load[vertex, best] = least
            wires.append(self._wires[vertex, best])
            if best == COORDINATOR:
                break
            end = self._placement[best].end
            hops.append((best, end - entry))
            vertex, entry = best, end
        self._kv.reserve(job, hops, tokens)
        return wires

    def follow(self, job: Job) -> None:
        """A decode pass goes that way again."""
        load, flow = self._load, self._flow
        for wire in job.wires:
            load[wire.src, wire.dst] += 1 / flow[wire.src][wire.dst]


def plain_rates(spec: ClusterSpec, edges: Mapping[Edge, float]) -> dict[Edge, float]:
    """Each link's own rate, in bytes/s."""
    bandwidth = {(link.src, link.dst): link.bandwidth_bytes_per_s for link in spec.links}
    return {edge: bandwidth[edge] for edge in edges}


def shared_rates(spec: ClusterSpec, flow: Flow, edges: Mapping[Edge, float]) -> dict[Edge, float]:
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
    rates = plain_rates(spec, edges)
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
