"""Whether a placement goes on when any one node is lost, and what is left of it then."""

from collections.abc import Mapping

from helixd.ids import NodeId
from helixd.layers import LayerRange
from helixd.plan.cluster.spec import COORDINATOR
from helixd.plan.graph.flow import FlowModel
from helixd.plan.graph.network import Network


def survives_one_loss(flows: FlowModel, placement: Mapping[NodeId, LayerRange]) -> bool:
    """Whether some pipeline is left whichever one node is lost.

    So it is iff two pipelines share no node (Menger): a flow of two through nodes that each let one pass.
    """
    inside = {node: 2 + 2 * at for at, node in enumerate(placement)}
    network = Network(3 + 2 * len(placement))
    begin = 2 + 2 * len(placement)
    network.add_arc(begin, 0, 2.0)
    for at in inside.values():
        network.add_arc(at, at + 1, 1.0)
    for src, dst in flows.edges(placement):
        network.add_arc(
            0 if src == COORDINATOR else inside[src] + 1, 1 if dst == COORDINATOR else inside[dst], 1.0
        )  # fmt: skip
    return network.augment(begin, 1) >= 2 - 1e-6
