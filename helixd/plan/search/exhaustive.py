"""Tiny clusters: look at every placement. The maximum flow it returns is the optimum, links included.

What no placement can exceed is computed for all at once; placements are then tried from the best down until none can
beat the flow found, so few max flows are needed.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from helixd.ids import NodeId
from helixd.layers import LayerRange
from helixd.plan.cluster.spec import COORDINATOR
from helixd.plan.graph.flow import FlowModel, node_capacity
from helixd.plan.holding import Holding

_MAX_PLACEMENTS = 250_000
_MAX_FLOWS = 4000


def best_of_all(holding: Holding, flows: FlowModel) -> tuple[dict[NodeId, LayerRange], bool] | None:
    """The placement of largest flow (empty: none carries anything) and whether that is proven; None: too large."""
    nodes = holding.usable()
    options: list[tuple[LayerRange | None, ...]] = []
    count = 1
    for node in nodes:
        own = holding.options(node.id)
        options.append(own if holding.must_hold(node.id) else (None, *own))
        count *= len(options[-1])
        if count > _MAX_PLACEMENTS:
            return None
    if not nodes or not count:
        return None
    bound = np.minimum(_covers(holding, flows, options, count), _crossings(holding, flows, options, count))
    best: dict[NodeId, LayerRange] = {}
    best_flow = 0.0
    order = np.argsort(-bound, kind="stable")
    for tried, index in enumerate(order):
        if bound[index] <= best_flow * (1 + 1e-9):
            return best, True
        if tried >= _MAX_FLOWS:
            break
        placement = _placement(int(index), nodes_ids=[node.id for node in nodes], options=options)
        flow = flows.value(placement)
        if flow > best_flow * (1 + 1e-9):
            best_flow, best = flow, placement
    else:
        return best, True
    return best, False


def _choices(options: Sequence[Sequence[LayerRange | None]], count: int) -> list[NDArray[np.int64]]:
    """For each node the option it has in each placement, the last node's changing fastest."""
    return list(np.unravel_index(np.arange(count), [len(ranges) for ranges in options]))


def _covers(
    holding: Holding, flows: FlowModel, options: Sequence[Sequence[LayerRange | None]], count: int
) -> NDArray[np.float64]:
    """What the least covered layer has. The coordinator's links are two more "layers", before and after all."""
    nodes = holding.usable()
    cover = np.zeros((count, holding.num_layers + 2))
    for node, ranges, choice in zip(nodes, options, _choices(options, count), strict=True):
        table = np.zeros((len(ranges), holding.num_layers + 2))
        inward = sum(flows.link_capacity(other.id, node.id) for other in nodes if other is not node)
        outward = sum(flows.link_capacity(node.id, other.id) for other in nodes if other is not node)
        for i, held in enumerate(ranges):
            if held is None:
                continue
            first, last = held.start == 0, held.end == holding.num_layers
            entry = flows.link_capacity(COORDINATOR, node.id) if first else 0.0
            leave = flows.link_capacity(node.id, COORDINATOR) if last else 0.0
            rate = min(node_capacity(holding.spec, node, len(held)), entry + inward, leave if last else outward)
            table[i, 1 + held.start : 1 + held.end] = rate
            table[i, 0] = min(rate, entry)
            table[i, -1] = min(rate, leave)
        cover += table[choice]
    least: NDArray[np.float64] = cover.min(axis=1)
    return least


def _crossings(
    holding: Holding, flows: FlowModel, options: Sequence[Sequence[LayerRange | None]], count: int
) -> NDArray[np.float64]:
    """What gets from one layer to the next where that is least: inside of nodes, and over links from ends of ranges."""
    nodes, num_layers = holding.usable(), holding.num_layers
    if num_layers < 2:
        return np.full(count, np.inf)
    choices = _choices(options, count)
    rates = [
        [node_capacity(holding.spec, node, len(held)) if held is not None else 0.0 for held in ranges]
        for node, ranges in zip(nodes, options, strict=True)
    ]
    # Column b: from layer b to layer b + 1.
    through = np.zeros((count, num_layers - 1))
    for u, ranges in enumerate(options):
        inside = np.zeros((len(ranges), num_layers - 1))
        for i, held in enumerate(ranges):
            if held is not None:
                inside[i, held.start : held.end - 1] = rates[u][i]
        through += inside[choices[u]]
        for v, others in enumerate(options):
            link = flows.link_capacity(nodes[u].id, nodes[v].id) if u != v else 0.0
            if link <= 0:
                continue
            pairs = np.zeros((len(ranges), len(others), num_layers - 1))
            for i, held in enumerate(ranges):
                for j, other in enumerate(others):
                    if held is not None and other is not None and other.start <= held.end < other.end:
                        pairs[i, j, held.end - 1] = min(link, rates[u][i], rates[v][j])
            through += pairs[choices[u], choices[v]]
    least: NDArray[np.float64] = through.min(axis=1)
    return least


def _placement(
    index: int, nodes_ids: list[NodeId], options: list[tuple[LayerRange | None, ...]]
) -> dict[NodeId, LayerRange]:
    placement: dict[NodeId, LayerRange] = {}
    for node, ranges in zip(reversed(nodes_ids), reversed(options), strict=True):
        index, at = divmod(index, len(ranges))
        held = ranges[at]
        if held is not None:
            placement[node] = held
    return dict(sorted(placement.items()))
