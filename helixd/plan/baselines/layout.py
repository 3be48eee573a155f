"""What a baseline decides: a placement, and which links its pipelines use."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from helixd.ids import NodeId
from helixd.layers import LayerRange
from helixd.plan.cluster.spec import COORDINATOR, LinkSpec, NodeSpec
from helixd.plan.holding import Holding


@dataclass(frozen=True, slots=True)
class Layout:
    """`links`: the only ones used; None for all."""

    placement: Mapping[NodeId, LayerRange]
    links: tuple[LinkSpec, ...] | None = None


def within_groups(links: Sequence[LinkSpec], groups: Sequence[Sequence[NodeId]]) -> tuple[LinkSpec, ...]:
    """The links inside the groups, and those to and from the coordinator."""
    of = {node: number for number, group in enumerate(groups) for node in group}
    return tuple(
        link for link in links if COORDINATOR in (link.src, link.dst) or (of.get(link.src, -1) == of.get(link.dst, -2))
    )


def even_cuts(num_layers: int, stages: int) -> list[LayerRange]:
    """The layers in `stages` ranges whose lengths differ by one at most, longer ones first."""
    each, extra = divmod(num_layers, stages)
    cuts: list[LayerRange] = []
    at = 0
    for stage in range(stages):
        end = at + each + (stage < extra)
        cuts.append(LayerRange(at, end))
        at = end
    return cuts


def throughput(holding: Holding, node: NodeSpec, layers: int) -> float:
    """T(layers) of a node, without its NICs: what these rules look at."""
    return node.profile.throughput_tokens_per_s[layers - 1]
