"""Regions: nodes among which links are fat, with thin ones between. Found from the links, not from names.

Where slow links separate many regions, one pipeline in each may carry more than a thick one across them all.
"""

from collections.abc import Collection, Iterable
from dataclasses import replace
from itertools import pairwise

from helixd.ids import NodeId
from helixd.plan.cluster.spec import COORDINATOR, ClusterSpec
from helixd.plan.graph.flow import FlowModel
from helixd.plan.holding import Holding

# Thin links are at least so many times slower than fat ones.
_CONTRAST = 4.0


def islands(flows: FlowModel, nodes: Iterable[NodeId], least: float) -> tuple[tuple[NodeId, ...], ...]:
    """Nodes connected, in either direction, by links of at least `least` tokens/s; the largest groups first."""
    order = list(nodes)
    group = {node: node for node in order}

    def root(node: NodeId) -> NodeId:
        while group[node] != node:
            group[node] = group[group[node]]
            node = group[node]
        return node

    for src in order:
        for dst, rate in flows.links_of(src).items():
            if rate >= least and dst in group:
                group[root(src)] = root(dst)
    found: dict[NodeId, list[NodeId]] = {}
    for node in order:
        found.setdefault(root(node), []).append(node)
    return tuple(sorted((tuple(members) for members in found.values()), key=lambda members: (-len(members), members)))


def regions(holding: Holding, flows: FlowModel) -> tuple[tuple[NodeId, ...], ...]:
    """The usable nodes by region: cut where, from one link speed to the next, there is the widest jump.

    One region where all links are much alike, or where the thin ones are no narrower than the nodes.
    """
    nodes = [node.id for node in holding.usable()]
    everything = (tuple(nodes),)
    speeds = sorted({rate for node in nodes for rate in flows.links_of(node).values() if rate > 0})
    ratio, fat = max(((b / a, b) for a, b in pairwise(speeds)), default=(1.0, 0.0))
    if ratio < _CONTRAST:
        return everything
    found = islands(flows, nodes, fat)
    return found if len(found) < len(nodes) else everything


def pods(holding: Holding, found: Collection[Collection[NodeId]]) -> tuple[tuple[NodeId, ...], ...]:
    """Groups of regions that can each hold the model: single regions, and those too small for it together."""
    alone: list[tuple[NodeId, ...]] = []
    rest: list[NodeId] = []
    for members in found:
        room = sum(holding.max_layers(node) for node in members)
        if room >= holding.num_layers:
            alone.append(tuple(members))
        else:
            rest.extend(members)
    if sum(holding.max_layers(node) for node in rest) >= holding.num_layers:
        alone.append(tuple(rest))
    return tuple(alone)


def part_of(spec: ClusterSpec, members: Collection[NodeId]) -> ClusterSpec:
    """The cluster of these nodes only, with the coordinator and the links among them."""
    kept = {*members, COORDINATOR}
    return replace(
        spec,
        nodes=tuple(node for node in spec.nodes if node.id in kept),
        links=tuple(link for link in spec.links if link.src in kept and link.dst in kept),
    )
