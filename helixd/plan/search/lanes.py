"""Lanes: beside a node that holds all of a stage's layers, a few that hold them one after the other.

Where all nodes of a stage must hold the same layers, what they carry does not add up neatly; lanes let small nodes
stand beside large ones. Which lanes make a stage is decided in `helixd.plan.search.columns`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement

from helixd.ids import NodeId
from helixd.layers import LayerRange
from helixd.plan.search.stages import Kind


@dataclass(frozen=True, slots=True)
class Lane:
    """Nodes of `kinds` in sequence, holding `layers` layers each; together as many as the stage has."""

    kinds: tuple[int, ...]
    layers: tuple[int, ...]
    rate: float


@dataclass(frozen=True, slots=True)
class LaneStage:
    """`layers` layers, covered by each of the lanes."""

    layers: int
    lanes: tuple[Lane, ...]

    def flow(self) -> float:
        """Tokens/s through all lanes together."""
        return sum(lane.rate for lane in self.lanes)


def lay_out_lanes(stages: Sequence[LaneStage], kinds: Sequence[Kind], num_layers: int) -> dict[NodeId, LayerRange]:
    """The stages as ranges, one after the other; what reaches beyond the last layer is cut off."""
    unused = [list(kind.nodes) for kind in kinds]
    placement: dict[NodeId, LayerRange] = {}
    base = 0
    for stage in sorted(stages, key=lambda stage: -stage.layers):
        for lane in stage.lanes:
            start = base
            for kind, layers in zip(lane.kinds, lane.layers, strict=True):
                node = unused[kind].pop(0)
                if start < num_layers:
                    placement[node] = LayerRange(start, min(num_layers, start + layers))
                start += layers
        base += stage.layers
    return placement


def lanes_of(kinds: Sequence[Kind], layers: int, longest: int) -> list[Lane]:
    """Nodes alone, and up to `longest` in sequence cut where the slowest is fastest; fastest lanes first."""
    found: list[Lane] = []
    for length in range(1, longest + 1):
        for chosen in combinations_with_replacement(range(len(kinds)), length):
            if any(chosen.count(k) > len(kinds[k].nodes) for k in set(chosen)):
                continue
            if (cut := _cut([kinds[k] for k in chosen], layers)) is not None:
                found.append(Lane(chosen, cut[1], cut[0]))
    return sorted(found, key=lambda lane: (-lane.rate, lane.kinds))


def _cut(kinds: Sequence[Kind], layers: int) -> tuple[float, tuple[int, ...]] | None:
    """The fastest way to share `layers` layers among one node of each kind: its rate and the cuts."""
    head, *rest = kinds
    if not rest:
        return (head.capacity[layers - 1], (layers,)) if head.holds(layers, False, False) else None
    if len(rest) == 1:
        return _cut_in_two(head, rest[0], layers)
    best: tuple[float, tuple[int, ...]] | None = None
    for own in range(head.fewest, min(head.most[0][0], layers - len(rest)) + 1):
        rate = head.capacity[own - 1]
        if (best is None or rate > best[0]) and (tail := _cut(rest, layers - own)) is not None:
            rate = min(rate, tail[0])
            if best is None or rate > best[0]:
                best = (rate, (own, *tail[1]))
    return best


def _cut_in_two(head: Kind, tail: Kind, layers: int) -> tuple[float, tuple[int, ...]] | None:
    """The same for two nodes, which is most of the work."""
    first = max(head.fewest, layers - tail.most[0][0])
    last = min(head.most[0][0], layers - max(1, tail.fewest))
    best, cut = -1.0, 0
    for own in range(first, last + 1):
        rate = min(head.capacity[own - 1], tail.capacity[layers - own - 1])
        if rate > best:
            best, cut = rate, own
    return (best, (cut, layers - cut)) if cut else None
