"""Flow against depth: the fewest stages that carry a flow. Links are not looked at.

Every stage is one more hop and one more batch to wait for, so the thickest plan is seldom the one that serves most.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from helixd.ids import NodeId
from helixd.layers import LayerRange
from helixd.plan.bounds import capacity_bound
from helixd.plan.holding import Holding
from helixd.plan.search.columns import StageColumns
from helixd.plan.search.cover import least_cover
from helixd.plan.search.lanes import lay_out_lanes
from helixd.plan.search.stages import best_cover, cover, few_kinds, kinds_of, lay_out

# From so many nodes on stages are generated one by one, not listed.
_LISTED = 60
_STEPS = 24


@dataclass(frozen=True, slots=True)
class Depth:
    """A placement of `stages` stages, each of at least `flow_tokens_per_s`."""

    flow_tokens_per_s: float
    stages: int
    placement: Mapping[NodeId, LayerRange]


def fewest_stages(holding: Holding, flow: float, *, seed: int = 0) -> Depth | None:
    """The fewest stages found, each of at least `flow` tokens/s; None if no stages carry so much."""
    kinds = few_kinds(kinds_of(holding))
    num_layers = holding.num_layers
    if len(holding.usable()) < _LISTED:
        stages = cover(kinds, num_layers, flow, fewest=True, seed=seed)
        placement = lay_out(stages, kinds, num_layers) if stages is not None else {}
    else:
        lanes = StageColumns(kinds, num_layers, length=1, seed=seed).cover(flow, fewest=True)
        placement = lay_out_lanes(lanes, kinds, num_layers) if lanes is not None else {}
    if not placement:
        return None
    return Depth(least_cover(holding, placement), len(set(placement.values())), placement)


def frontier(holding: Holding, *, least: float = 0.2, steps: int = _STEPS, seed: int = 0) -> tuple[Depth, ...]:
    """Placements from the thickest to one of `least` of its flow, each of fewer stages than the one before."""
    kinds = few_kinds(kinds_of(holding))
    bound = capacity_bound(holding)
    if len(holding.usable()) < _LISTED:
        thickest = best_cover(kinds, holding.num_layers, bound, seed=seed)
        top = thickest[0] if thickest is not None else 0.0
    else:
        columns = StageColumns(kinds, holding.num_layers, length=1, seed=seed).best(0.0, bound, first=0.9)
        top = columns[0] if columns is not None else 0.0
    if top <= 0:
        return ()
    found: list[Depth] = []
    for step in range(steps):
        asked = top * (1 - 1e-9) * (1 - (1 - least) * step / max(1, steps - 1))
        depth = fewest_stages(holding, asked, seed=seed)
        if depth is not None:
            found.append(depth)
    return pareto(found)


def pareto(depths: Sequence[Depth]) -> tuple[Depth, ...]:
    """Those that no other one beats in flow with as few stages; falling flow, falling depth."""
    kept: list[Depth] = []
    for depth in sorted(depths, key=lambda depth: (-depth.flow_tokens_per_s, depth.stages)):
        if not kept or depth.stages < kept[-1].stages:
            kept.append(depth)
    return tuple(kept)
