"""A planner that takes no time: keeps what still works, else the first chain of nodes that covers all layers.

Stands in for the planner's process in virtual worlds. Spare nodes go where they raise the flow most.
"""

from collections.abc import Mapping
from itertools import permutations

from helixd.ids import NodeId
from helixd.layers import LayerRange
from helixd.plan.cluster.spec import ClusterSpec, NodeSpec
from helixd.plan.graph.flow import FlowModel
from helixd.plan.graph.schedule import schedule_of
from helixd.plan.plan import Infeasible, Plan


def quick_plan(spec: ClusterSpec) -> Plan:
    """Raises Infeasible."""
    flows = FlowModel(spec)
    num_layers = spec.model.num_layers
    room = {node.id: layers for node in spec.nodes if (layers := most_layers(spec, node))}
    held = {n.id: n.current_range for n in spec.nodes if n.current_range is not None}
    kept = {node: layers for node, layers in held.items() if len(layers) <= room.get(node, 0)}
    placement = kept if flows.value(kept) > 0 else _chain(flows, room, num_layers)
    for node, layers in sorted(room.items()):
        if node not in placement:
            tries = [{**placement, node: LayerRange(at, at + layers)} for at in range(num_layers - layers + 1)]
            placement = max(tries, key=flows.value)
    return plan_of(spec, placement)


def most_layers(spec: ClusterSpec, node: NodeSpec) -> int:
    """What a node may hold, with the KV room that the workload wants left."""
    most = min(node.max_layers or spec.model.num_layers, node.profile.max_layers, spec.model.num_layers)
    room, tokens = node.profile.kv_capacity_token_layers, spec.workload.min_kv_tokens
    return max((layers for layers in range(1, most + 1) if room[layers - 1] >= layers * tokens), default=0)


def plan_of(spec: ClusterSpec, placement: Mapping[NodeId, LayerRange]) -> Plan:
    """The plan with this placement. Raises Infeasible if nothing flows."""
    flow = FlowModel(spec).solve(placement)
    if flow.value <= 0:
        raise Infeasible("nothing flows")
    return Plan(spec.model.num_layers, dict(placement), schedule_of(flow), flow.value, method="quick")


def what_is_left(spec: ClusterSpec, placement: Mapping[NodeId, LayerRange]) -> Plan | None:
    """What a placement is worth with the nodes there are; None if nothing flows."""
    known = {node.id for node in spec.nodes}
    try:
        return plan_of(spec, {node: held for node, held in placement.items() if node in known})
    except Infeasible:
        return None


def _chain(flows: FlowModel, room: Mapping[NodeId, int], num_layers: int) -> dict[NodeId, LayerRange]:
    for order in permutations(sorted(room)):
        chain: dict[NodeId, LayerRange] = {}
        start = 0
        for node in order:
            chain[node] = LayerRange(start, min(num_layers, start + room[node]))
            start = chain[node].end
            if start == num_layers:
                break
        if start == num_layers and flows.value(chain) > 0:
            return chain
    raise Infeasible(f"the nodes have room for {sum(room.values())} of {num_layers} layers, or no links")
