"""The max flow of a placement: how many tokens/s (prompt and decode) a cluster can carry with it.

Graph: source -> v iff v starts at layer 0; v -> sink iff v ends at the last layer; u -> v iff
`start_v <= end_u < end_v` (a sequence enters v's range at `end_u`, perhaps in its middle). A node carries at most
T(layers held) and what its NICs take in activations; a link carries bandwidth / activation bytes, or bandwidth /
token bytes where the coordinator is at one end. `end` rises along every edge, so flows have no cycles.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from helixd.ids import NodeId
from helixd.layers import LayerRange
from helixd.plan.cluster.spec import COORDINATOR, ClusterSpec, NodeSpec
from helixd.plan.graph.network import Network
from helixd.plan.graph.spread import shared_paths

Placement = Mapping[NodeId, LayerRange]
Edge = tuple[NodeId, NodeId]


@dataclass(frozen=True, slots=True)
class Flow:
    """A maximum flow. `edges` has only edges that carry something; `COORDINATOR` is source and sink.

    `tight_nodes` and `tight_edges` are one minimum cut: raising none of them, the flow cannot rise.
    """

    value: float
    edges: Mapping[Edge, float]
    through: Mapping[NodeId, float]
    tight_nodes: frozenset[NodeId]
    tight_edges: frozenset[Edge]


def node_capacity(spec: ClusterSpec, node: NodeSpec, layers: int) -> float:
    """Tokens/s that `node` carries when it holds `layers` layers: T, and its NICs where they are known."""
    capacity = node.profile.throughput_tokens_per_s[layers - 1]
    for nic in (node.nic_in_bytes_per_s, node.nic_out_bytes_per_s):
        if nic is not None:
            capacity = min(capacity, nic / spec.model.activation_bytes)
    return capacity


def usable(upstream: LayerRange, downstream: LayerRange) -> bool:
    """Whether a sequence that leaves `upstream` at its end can go on in `downstream`."""
    return downstream.start <= upstream.end < downstream.end


class FlowModel:
    """Max flows of many placements of one cluster; links are looked up once."""

    def __init__(self, spec: ClusterSpec) -> None:
        self.spec = spec
        self._nodes = {node.id: node for node in spec.nodes}
        self._out: dict[NodeId, dict[NodeId, float]] = {node.id: {} for node in spec.nodes}
        self._from_source: dict[NodeId, float] = {}
        self._to_sink: dict[NodeId, float] = {}
        model = spec.model
        for link in spec.links:
            if link.bandwidth_bytes_per_s <= 0:
                continue
            if link.src == COORDINATOR:
                self._from_source[link.dst] = link.bandwidth_bytes_per_s / model.token_bytes
            elif link.dst == COORDINATOR:
                self._to_sink[link.src] = link.bandwidth_bytes_per_s / model.token_bytes
            else:
                self._out[link.src][link.dst] = link.bandwidth_bytes_per_s / model.activation_bytes
        self._source_room = _room(spec.coordinator_nic_out_bytes_per_s, model.token_bytes)
        self._sink_room = _room(spec.coordinator_nic_in_bytes_per_s, model.token_bytes)

    def link_capacity(self, src: NodeId, dst: NodeId) -> float:
        """Tokens/s of a link; 0 where there is none. `COORDINATOR` as either end."""
        if src == COORDINATOR:
            return self._from_source.get(dst, 0.0)
        if dst == COORDINATOR:
            return self._to_sink.get(src, 0.0)
        return self._out[src].get(dst, 0.0)

    def links_of(self, src: NodeId) -> Mapping[NodeId, float]:
        """The links that lead from a node to other nodes, in tokens/s."""
        return self._out[src]

    def edges(self, placement: Placement) -> dict[Edge, float]:
        """Every edge of the placement's graph with its link's capacity, in a fixed order."""
        num_layers = self.spec.model.num_layers
        edges: dict[Edge, float] = {}
        for node, held in placement.items():
            if held.start == 0 and node in self._from_source:
                edges[COORDINATOR, node] = self._from_source[node]
            if held.end == num_layers:
                if node in self._to_sink:
                    edges[node, COORDINATOR] = self._to_sink[node]
                continue
            out = self._out[node]
            end = held.end
            for other, other_held in placement.items():
                if other_held.start <= end < other_held.end and other in out:
                    edges[node, other] = out[other]
        return edges

    def value(self, placement: Placement) -> float:
        """The max flow in tokens/s."""
        return self._run(placement)[0]

    def solve(self, placement: Placement, *, spread: bool = True) -> Flow:
        """A max flow with its edges and a minimum cut.

        `spread`: of the many max flows take one that shares the load over equal alternatives (nodes and links), which
        leaves other hops to go to when a node is lost. Raises KeyError for an unknown node.
        """
        value, network, node_arcs, edge_arcs = self._run(placement)
        if spread and value > 0:
            value, network, node_arcs, edge_arcs = self._run(placement, share=value)
        floor = network.eps * 10
        near = network.reachable(0)
        inside = {node: 2 + 2 * i for i, node in enumerate(placement)}
        edges = {edge: flow for edge, arc in edge_arcs.items() if (flow := network.flow(arc)) > floor}
        through = {node: flow for node, arc in node_arcs.items() if (flow := network.flow(arc)) > floor}
        tight_nodes = frozenset(node for node, at in inside.items() if near[at] and not near[at + 1])
        tight_edges = frozenset(
            (src, dst)
            for src, dst in edge_arcs
            if (near[inside[src] + 1] if src != COORDINATOR else near[-2])
            and not (near[inside[dst]] if dst != COORDINATOR else near[-1])
        )
        return Flow(value, edges, through, tight_nodes, tight_edges)

    def survives(self, placement: Placement) -> bool:
        """Whether a complete pipeline is left whichever one node is lost: two that share no node, by Menger."""
        inside = {node: 2 + 2 * i for i, node in enumerate(placement)}
        network = Network(2 + 2 * len(placement))
        for node, held in placement.items():
            if node_capacity(self.spec, self._nodes[node], len(held)) > 0:
                network.add_arc(inside[node], inside[node] + 1, 1.0)
        for src, dst in self.edges(placement):
            tail = inside[src] + 1 if src != COORDINATOR else 0
            network.add_arc(tail, inside[dst] if dst != COORDINATOR else 1, 1.0)
        return network.augment(0, 1, enough=2.0) >= 2.0

    def _run(
        self, placement: Placement, *, share: float | None = None
    ) -> tuple[float, Network, dict[NodeId, int], dict[Edge, int]]:
        """Vertices: 0 source, 1 sink, 2+2i and 3+2i in and out of node i, then the coordinator's NIC ends."""
        edges = self.edges(placement)
        capacity = {node: node_capacity(self.spec, self._nodes[node], len(held)) for node, held in placement.items()}
        total = sum(capacity.values())
        inside = {node: 2 + 2 * i for i, node in enumerate(placement)}
        last = 2 + 2 * len(placement)
        network = Network(last + 2, eps=1e-12 * max(total, 1e-9))
        coordinator_out = network.add_arc(0, last, min(self._source_room, 2 * total))
        coordinator_in = network.add_arc(last + 1, 1, min(self._sink_room, 2 * total))
        # Clipped to twice what its ends carry: a fat link must not swell the numbers, nor pass for part of a cut.
        bounds = {
            (src, dst): min(room, 2 * capacity.get(src, total), 2 * capacity.get(dst, total))
            for (src, dst), room in edges.items()
        }
        node_arcs = {node: network.add_arc(at, at + 1, capacity[node]) for node, at in inside.items()}
        edge_arcs = {
            (src, dst): network.add_arc(
                inside[src] + 1 if src != COORDINATOR else last,
                inside[dst] if dst != COORDINATOR else last + 1,
                room,
            )
            for (src, dst), room in bounds.items()
        }
        laid = 0.0
        if share is not None:
            order = sorted(placement, key=lambda node: (placement[node].end, node))
            for edge, flow in shared_paths(share, order, capacity, bounds).items():
                network.preload(edge_arcs[edge], flow)
                if edge[0] == COORDINATOR:
                    network.preload(coordinator_out, flow)
                    laid += flow
                else:
                    network.preload(node_arcs[edge[0]], flow)
                if edge[1] == COORDINATOR:
                    network.preload(coordinator_in, flow)
        value = laid + network.augment(0, 1)
        return value, network, node_arcs, edge_arcs


def _room(nic_bytes_per_s: float | None, token_bytes: float) -> float:
    return float("inf") if nic_bytes_per_s is None else nic_bytes_per_s / token_bytes
