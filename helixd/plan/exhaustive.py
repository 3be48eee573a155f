"""Tiny clusters: look at every placement. The maximum flow it returns is the optimum, links included.

All covers are computed at once; placements are then tried from the best cover down until no cover can beat the flow
found, so few max flows are needed.
"""

import numpy as np

from helixd.ids import NodeId
from helixd.layers import LayerRange
from helixd.plan.flow import FlowModel, node_capacity
from helixd.plan.holding import Holding
from helixd.plan.spec import COORDINATOR

_MAX_PLACEMENTS = 250_000
_MAX_FLOWS = 4000


def best_of_all(holding: Holding, flows: FlowModel) -> tuple[dict[NodeId, LayerRange], bool] | None:
    """The placement of largest flow and whether that is proven; None for clusters too large, or without any."""
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
    # The coordinator's links are two more "layers" to be covered: one before the first, one after the last.
    rows = holding.num_layers + 2
    cover = np.zeros((1, rows), dtype=np.float64)
    for node, ranges in zip(nodes, options, strict=True):
        table = np.zeros((len(ranges), rows))
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
        cover = (cover[:, None, :] + table[None, :, :]).reshape(-1, rows)
    bound = cover.min(axis=1)
    best: dict[NodeId, LayerRange] | None = None
    best_flow = 0.0
    order = np.argsort(-bound, kind="stable")
    for tried, index in enumerate(order):
        if bound[index] <= best_flow * (1 + 1e-9):
            return (best, True) if best is not None else None
        if tried >= _MAX_FLOWS:
            break
        placement = _placement(int(index), nodes_ids=[node.id for node in nodes], options=options)
        flow = flows.value(placement)
        if flow > best_flow * (1 + 1e-9):
            best_flow, best = flow, placement
    else:
        return (best, True) if best is not None else None
    return (best, False) if best is not None else None


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
