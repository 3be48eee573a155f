"""SWARM's stages: equal parts as large as the smallest node can hold, nodes dealt out to the weakest stage.

Ryabinin et al., "SWARM parallelism" (arXiv 2301.11913). The strongest node is dealt first. Knows nothing of links.
"""

from helixd.ids import NodeId
from helixd.layers import LayerRange
from helixd.plan.baselines.layout import Layout, even_cuts, throughput
from helixd.plan.holding import Holding
from helixd.plan.plan import Infeasible


def place(holding: Holding, seed: int, time_limit_s: float) -> Layout:
    """The placement with the fewest stages. Raises Infeasible if there are fewer nodes than stages."""
    nodes = holding.usable()
    if not nodes:
        raise Infeasible("no node can hold a layer")
    smallest = min(holding.max_layers(node.id) for node in nodes)
    fewest = -(-holding.num_layers // smallest)
    for count in range(fewest, min(len(nodes), holding.num_layers) + 1):
        if (placement := _deal(holding, even_cuts(holding.num_layers, count))) is not None:
            return Layout(placement)
    raise Infeasible(f"{len(nodes)} nodes do not fill {fewest} stages of at most {smallest} layers, or more")


def _deal(holding: Holding, stages: list[LayerRange]) -> dict[NodeId, LayerRange] | None:
    """The strongest node first, each to the weakest stage that it may hold; None if a stage stays empty."""
    strength = [0.0] * len(stages)
    placement: dict[NodeId, LayerRange] = {}
    for node in sorted(holding.usable(), key=lambda node: (-throughput(holding, node, len(stages[0])), node.id)):
        fits = [n for n, held in enumerate(stages) if holding.allows(node.id, held)]
        if fits:
            weakest = min(fits, key=lambda n: (strength[n], n))
            strength[weakest] += throughput(holding, node, len(stages[weakest]))
            placement[node.id] = stages[weakest]
    return placement if min(strength) > 0 else None
