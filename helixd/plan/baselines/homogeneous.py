"""All nodes taken for equal: one even split, as servers do that know ranks and not speeds.

The number of stages is the one that puts most nodes to use, then the smaller; nodes that cannot hold an even part are
left out.
"""

from helixd.ids import NodeId
from helixd.layers import LayerRange
from helixd.plan.baselines.layout import Layout, even_cuts, within_groups
from helixd.plan.holding import Holding
from helixd.plan.plan import Infeasible


def place(holding: Holding, seed: int, time_limit_s: float) -> Layout:
    """Even pipelines in the order of the nodes. Raises Infeasible if no even split fits."""
    best: list[dict[NodeId, LayerRange]] = []
    for stages in range(1, min(len(holding.usable()), holding.num_layers) + 1):
        cuts = even_cuts(holding.num_layers, stages)
        able = [n.id for n in holding.usable() if all(holding.allows(n.id, held) for held in cuts)]
        split = [
            dict(zip(able[at : at + stages], cuts, strict=True)) for at in range(0, len(able) - stages + 1, stages)
        ]
        if sum(map(len, split)) > sum(map(len, best)):
            best = split
    if not best:
        raise Infeasible("no even split fits: too few nodes hold an even part")
    placement = {node: held for pipeline in best for node, held in pipeline.items()}
    return Layout(placement, within_groups(holding.spec.links, [list(pipeline) for pipeline in best]))
