"""A pipeline, or several, for each type of node by itself: what is done where mixed pipelines are not thought of.

A type whose nodes together do not hold the model serves nothing. Within a type, the fewest nodes that hold the model
make one pipeline; a second one is made of the next nodes, and what is left over is idle.
"""

from helixd.ids import NodeId
from helixd.layers import LayerRange
from helixd.plan.baselines.layout import Layout, even_cuts, within_groups
from helixd.plan.cluster.spec import NodeSpec
from helixd.plan.holding import Holding
from helixd.plan.plan import Infeasible


def place(holding: Holding, seed: int, time_limit_s: float) -> Layout:
    """Separate pipelines. Raises Infeasible if no type holds the model."""
    types: dict[str, list[NodeSpec]] = {}
    for node in holding.usable():
        types.setdefault(node.profile.type, []).append(node)
    placement: dict[NodeId, LayerRange] = {}
    groups: list[list[NodeId]] = []
    for nodes in types.values():
        for pipeline in pipelines(holding, nodes):
            placement |= pipeline
            groups.append(list(pipeline))
    if not groups:
        rooms = {name: sum(holding.max_layers(node.id) for node in nodes) for name, nodes in types.items()}
        held = ", ".join(f"{name} {rooms[name]}" for name in sorted(rooms))
        raise Infeasible(
            f"no type of node holds the model by itself, as separate pipelines need: of {holding.num_layers} layers "
            f"the memory of all its nodes takes {held}"
        )
    return Layout(placement, within_groups(holding.spec.links, groups))


def pipelines(holding: Holding, nodes: list[NodeSpec]) -> list[dict[NodeId, LayerRange]]:
    """As many even pipelines as `nodes` give, each over the fewest nodes that hold the model."""
    made: list[dict[NodeId, LayerRange]] = []
    left = list(nodes)
    for stages in range(1, len(nodes) + 1):
        cuts = even_cuts(holding.num_layers, stages) if stages <= holding.num_layers else []
        while cuts and (pipeline := _deal(holding, left, cuts)):
            made.append(pipeline)
            left = [node for node in left if node.id not in pipeline]
        if made:
            break
    return made


def _deal(holding: Holding, nodes: list[NodeSpec], cuts: list[LayerRange]) -> dict[NodeId, LayerRange]:
    """A node for every cut, in the order of the nodes; empty if one finds none."""
    dealt: dict[NodeId, LayerRange] = {}
    for held in cuts:
        fit = next((n for n in nodes if n.id not in dealt and holding.allows(n.id, held)), None)
        if fit is None:
            return {}
        dealt[fit.id] = held
    return dealt
