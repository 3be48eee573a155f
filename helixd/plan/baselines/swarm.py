"""SWARM's stages: equal parts as large as the smallest node can hold, nodes dealt out to the weakest stage.

Ryabinin et al., "SWARM parallelism" (arXiv 2301.11913). The strongest node is dealt first. Knows nothing of links.
"""

from helixd.ids import NodeId
from helixd.layers import LayerRange
from helixd.plan.baselines.layout import Layout, even_cuts, throughput
from helixd.plan.holding import Holding
from helixd.plan.plan import Infeasible


def place(holding: Holding, seed: int, time_limit_s: float) -> Layout:
    """One placement. Raises Infeasible if there are fewer nodes than stages."""
    nodes = holding.usable()
    if not nodes:
        raise Infeasible("no node can hold a layer")
    smallest = min(holding.max_layers(node.id) for node in nodes)
    stages = even_cuts(holding.num_layers, -(-holding.num_layers // smallest))
    strength = [0.0] * len(stages)
    placement: dict[NodeId, LayerRange] = {}
    for node in sorted(nodes, key=lambda node: (-throughput(holding, node, len(stages[0])), node.id)):
        fits = [n for n, held in enumerate(stages) if holding.allows(node.id, held)]
        if fits:
            weakest = min(fits, key=lambda n: (strength[n], n))
            strength[weakest] += throughput(holding, node, len(stages[weakest]))
            placement[node.id] = stages[weakest]
    if min(strength) <= 0:
        empty = stages[strength.index(0.0)]
        raise Infeasible(f"{len(nodes)} nodes, {len(stages)} stages of {smallest} layers: none is left for {empty}")
    return Layout(placement)
