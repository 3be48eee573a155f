"""One sentence per node that is idle or a bottleneck, for operators."""

from collections.abc import Mapping

from helixd.ids import NodeId
from helixd.layers import LayerRange
from helixd.plan.cluster.spec import COORDINATOR, NodeSpec
from helixd.plan.graph.flow import Flow, FlowModel, node_capacity
from helixd.plan.holding import Holding


def explanations(holding: Holding, placement: Mapping[NodeId, LayerRange], flow: Flow) -> dict[NodeId, str]:
    """Why nodes hold nothing or carry nothing, and which nodes or links keep the flow from rising."""
    flows = FlowModel(holding.spec)
    said: dict[NodeId, str] = {}
    for node in holding.spec.nodes:
        held = placement.get(node.id)
        if held is None:
            said[node.id] = f"idle: {_why_empty(holding, flows, node)}"
        elif node.id not in flow.through:
            said[node.id] = f"idle: holds {held} but no flow needs it there"
        elif node.id in flow.tight_nodes:
            rate = node_capacity(holding.spec, node, len(held))
            said[node.id] = f"bottleneck: {held} runs at its full {rate:.1f} tokens/s"
        else:
            full = sorted(dst for src, dst in flow.tight_edges if src == node.id)
            if full:
                said[node.id] = f"bottleneck: its link to {', '.join(full)} is full"
    return said


def _why_empty(holding: Holding, flows: FlowModel, node: NodeSpec) -> str:
    if node.exclude:
        return "excluded by configuration"
    if holding.max_layers(node.id) == 0:
        return "cannot hold one layer with room for its KV cache"
    others = [other.id for other in holding.spec.nodes if other.id != node.id] + [COORDINATOR]
    if not any(flows.link_capacity(other, node.id) > 0 for other in others):
        return "no usable link leads to it"
    if not any(flows.link_capacity(node.id, other) > 0 for other in others):
        return "no usable link leads away from it"
    return "the plan serves no more with it than without"
