"""Placements for clusters in which not everybody reaches everybody: pipelines found along links that exist.

A chain is a path of nodes, coordinator to coordinator over usable links, that can hold all layers between them. Chains
are taken out one after the other; nodes that no further chain wants join the layers they can be reached at.
"""

from collections.abc import Sequence
from random import Random

from helixd.ids import NodeId
from helixd.layers import LayerRange
from helixd.plan.cluster.spec import COORDINATOR
from helixd.plan.graph.flow import FlowModel, node_capacity
from helixd.plan.holding import Holding

_STEPS = 20_000


def pipelines(holding: Holding, flows: FlowModel, *, seed: int = 0) -> dict[NodeId, LayerRange]:
    """As many node-disjoint chains as are found, each cut into ranges; empty if there is none.

    Pinned ranges are honoured only if a chain happens to allow them: the caller checks and repairs.
    """
    free = {node.id for node in holding.usable()}
    placement: dict[NodeId, LayerRange] = {}
    random = Random(seed)  # noqa: S311
    while (chain := _chain(holding, flows, sorted(free), random)) is not None:
        ranges = _cut(holding, chain)
        if not ranges:
            break
        placement |= ranges
        free -= ranges.keys()
    return placement


def _chain(holding: Holding, flows: FlowModel, free: Sequence[NodeId], random: Random) -> tuple[NodeId, ...] | None:
    """A path whose nodes can hold all layers; depth first, large and well connected nodes first."""
    layers = {node: holding.max_layers(node) for node in free}
    enters = [node for node in free if flows.link_capacity(COORDINATOR, node) > 0]
    leaves = {node for node in free if flows.link_capacity(node, COORDINATOR) > 0}
    after = {node: [other for other in free if flows.link_capacity(node, other) > 0] for node in free}
    rank = {node: layers[node] * (1 + 0.2 * random.random()) for node in free}
    path: list[NodeId] = []
    visited: set[NodeId] = set()
    steps = 0

    def room(path: Sequence[NodeId]) -> int:
        if len(path) == 1:
            return holding.max_layers(path[0], first=True, last=True)
        first, last = holding.max_layers(path[0], first=True), holding.max_layers(path[-1], last=True)
        return first + last + sum(layers[node] for node in path[1:-1])

    stack = [iter(sorted(enters, key=lambda node: (-rank[node], node)))]
    while stack and steps < _STEPS:
        steps += 1
        node = next(stack[-1], None)
        if node is None:
            stack.pop()
            if path:
                visited.discard(path.pop())
            continue
        if node in visited:
            continue
        path.append(node)
        visited.add(node)
        if node in leaves and room(path) >= holding.num_layers:
            return tuple(path)
        # Ways out are kept for later: a node with few of them left is taken before it is cut off.
        onward = [other for other in after[node] if other not in visited]
        stack.append(iter(sorted(onward, key=lambda other: (-rank[other], other))))
    return None


def _cut(holding: Holding, chain: Sequence[NodeId]) -> dict[NodeId, LayerRange]:
    """The chain's layers given out so that the slowest node is as fast as trimming one layer at a time makes it."""
    spec = holding.spec
    nodes = [spec.node(node) for node in chain]
    last = len(chain) - 1
    most = [holding.max_layers(node, first=i == 0, last=i == last) for i, node in enumerate(chain)]
    lengths = list(most)
    for _ in range(sum(lengths) - holding.num_layers):
        able = [i for i in range(len(chain)) if lengths[i] > holding.min_layers(chain[i])]
        if not able:
            return {}
        slowest = min(able, key=lambda i: (node_capacity(spec, nodes[i], lengths[i]), i))
        lengths[slowest] -= 1
    if any(not 1 <= length <= limit for length, limit in zip(lengths, most, strict=True)):
        return {}
    ranges: dict[NodeId, LayerRange] = {}
    start = 0
    for node, length in zip(chain, lengths, strict=True):
        ranges[node] = LayerRange(start, start + length)
        start += length
    return ranges
