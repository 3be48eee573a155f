"""Sharing a flow over alternatives: of the many flows of one value, one that loads nodes and links evenly.

The flow is laid in small equal portions, each along the path that is cheapest at the margin, where a node costs its
load over its capacity and a link a fraction of that. A greedy rule: what it cannot place is the caller's to add.
"""

from collections.abc import Mapping

from helixd.ids import NodeId
from helixd.plan.cluster.spec import COORDINATOR

Edge = tuple[NodeId, NodeId]

_PORTIONS = 60
_MAX_WORK = 2_000_000
_LINK_WEIGHT = 0.25
_EPS = 1e-9


def shared_paths(
    value: float, order: list[NodeId], capacity: Mapping[NodeId, float], bounds: Mapping[Edge, float]
) -> dict[Edge, float]:
    """Flow on edges, conserved and within `capacity` and `bounds`, of at most `value` in all.

    `order` lists the nodes so that every edge leads forward (by the end of their ranges).
    """
    into: dict[NodeId, list[tuple[NodeId, float]]] = {}
    for (src, dst), room in bounds.items():
        into.setdefault(dst, []).append((src, room))
    load = dict.fromkeys(order, 0.0)
    carried = dict.fromkeys(bounds, 0.0)
    portions = max(1, min(_PORTIONS, _MAX_WORK // max(1, len(bounds))))
    portion = value / portions
    stops = [*order, COORDINATOR]
    left = value
    # A full node leaves some portions to be split; so a few more rounds than portions.
    for _ in range(2 * portions):
        if left <= value * _EPS:
            break
        cost: dict[NodeId, float] = {}
        came: dict[NodeId, NodeId] = {}
        for stop in stops:
            own = 0.0
            if stop != COORDINATOR:
                if capacity[stop] - load[stop] <= value * _EPS:
                    continue
                own = (load[stop] + portion / 2) / capacity[stop]
            cheapest = float("inf")
            for src, room in into.get(stop, ()):
                used = carried[src, stop]
                if room - used <= value * _EPS or (src != COORDINATOR and src not in cost):
                    continue
                narrow = min(capacity.get(src, room), capacity.get(stop, room), room)
                through = (cost[src] if src != COORDINATOR else 0.0) + _LINK_WEIGHT * used / narrow
                if through < cheapest - 1e-12:
                    cheapest, came[stop] = through, src
            if stop in came:
                if stop == COORDINATOR:
                    break
                cost[stop] = cheapest + own
        if COORDINATOR not in came:
            break
        path = [(came[COORDINATOR], COORDINATOR)]
        while path[-1][0] != COORDINATOR:
            path.append((came[path[-1][0]], path[-1][0]))
        pushed = min(
            portion,
            left,
            *(bounds[edge] - carried[edge] for edge in path),
            *(capacity[src] - load[src] for src, _ in path if src != COORDINATOR),
        )
        for edge in path:
            carried[edge] += pushed
            if edge[0] != COORDINATOR:
                load[edge[0]] += pushed
        left -= pushed
    return carried
