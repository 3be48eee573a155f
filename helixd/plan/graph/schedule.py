"""A flow as schedules: per vertex the next hops and their weights, from which routes are drawn and links dialled."""

from collections.abc import Mapping

from helixd.ids import NodeId
from helixd.plan.cluster.spec import COORDINATOR
from helixd.plan.graph.flow import Flow
from helixd.plan.plan import Hop


def schedule_of(flow: Flow) -> Mapping[NodeId, tuple[Hop, ...]]:
    """Next hops of every vertex that carries flow, heaviest first (equal ones by id).

    The source comes under `COORDINATOR`; a hop to `COORDINATOR` is the sink.
    """
    hops: dict[NodeId, list[Hop]] = {COORDINATOR: []}
    for (src, dst), tokens_per_s in flow.edges.items():
        hops.setdefault(src, []).append(Hop(dst, tokens_per_s))
    return {
        vertex: tuple(sorted(found, key=lambda hop: (-hop.flow_tokens_per_s, hop.node)))
        for vertex, found in sorted(hops.items())
        if found or vertex == COORDINATOR
    }
