"""Stages of parallel lanes: beside a node that holds all of a stage's layers, a few that hold them one after the other.

Where all nodes of a stage must hold the same layers, what they carry does not add up neatly; lanes let small nodes
stand beside large ones. As in `helixd.plan.stages`, HiGHS covers the layers with such stages; links are not looked at.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement

from helixd.ids import NodeId
from helixd.layers import LayerRange
from helixd.plan import milp
from helixd.plan.stages import Kind

# (lanes in a stage, nodes in a lane, surplus over the flow): many long lanes at once would be too many stages.
_SHAPES = ((3, 2, 0.2), (2, 3, 0.1))
_LENGTH = 3
_MAX_STAGES = 600
_PROBES = 8
_PROBE_S = 3.0
_NODES = 300


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


def best_lane_cover(
    kinds: Sequence[Kind],
    num_layers: int,
    low: float,
    high: float,
    *,
    seed: int = 0,
    out_of_time: Callable[[], bool] = lambda: False,
) -> tuple[LaneStage, ...] | None:
    """Stages that cover all layers with more than `low` tokens/s, as near to `high` as a few bisections come."""
    best: tuple[LaneStage, ...] | None = None
    lanes = {layers: _lanes(kinds, layers) for layers in range(1, num_layers + 1)}
    for _ in range(_PROBES):
        if out_of_time() or high - low < 1e-3 * high:
            break
        middle = (low + high) / 2
        stages = [
            stage
            for width, length, surplus in _SHAPES
            for layers, every in lanes.items()
            for stage in _stages(
                kinds, layers, [lane for lane in every if len(lane.kinds) <= length], middle, width, surplus
            )
        ]
        chosen = _cover(kinds, num_layers, _promising(kinds, num_layers, stages), seed)
        if chosen is None:
            high = middle
        else:
            best = chosen
            low = max(middle, min(stage.flow() for stage in chosen))
    return best


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


def _lanes(kinds: Sequence[Kind], layers: int) -> list[Lane]:
    """Nodes alone, and two or three in sequence cut where the slowest is fastest; fastest lanes first."""
    found: list[Lane] = []
    for length in range(1, _LENGTH + 1):
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
    best: tuple[float, tuple[int, ...]] | None = None
    for own in range(head.fewest, min(head.most[0][0], layers - len(rest)) + 1):
        rate = head.capacity[own - 1]
        if (best is None or rate > best[0]) and (tail := _cut(rest, layers - own)) is not None:
            rate = min(rate, tail[0])
            if best is None or rate > best[0]:
                best = (rate, (own, *tail[1]))
    return best


def _stages(
    kinds: Sequence[Kind], layers: int, lanes: Sequence[Lane], flow: float, width: int, surplus: float
) -> Iterator[LaneStage]:
    """Minimal sets of up to `width` lanes that carry `flow` and not more than `surplus` of it in addition."""
    room = [len(kind.nodes) for kind in kinds]

    def extend(at: int, picked: tuple[Lane, ...], missing: float) -> Iterator[LaneStage]:
        if missing <= flow * 1e-9:
            if missing >= -surplus * flow:
                yield LaneStage(layers, picked)
            return
        if len(picked) == width:
            return
        for i in range(at, len(lanes)):
            lane = lanes[i]
            # Lanes get slower from here on: the places left cannot make up for what is missing.
            if lane.rate * (width - len(picked)) < missing * (1 - 1e-9):
                return
            for kind in lane.kinds:
                room[kind] -= 1
            if all(room[kind] >= 0 for kind in lane.kinds):
                yield from extend(i, (*picked, lane), missing - lane.rate)
            for kind in lane.kinds:
                room[kind] += 1

    yield from extend(0, (), flow)


def _promising(kinds: Sequence[Kind], num_layers: int, stages: Sequence[LaneStage]) -> list[LaneStage]:
    """The stages that cover most for the nodes they take, at the prices of the linear program; none if it fails."""
    program = _program(kinds, stages, integer=False)
    program.cost = [-float(stage.layers) for stage in stages]
    solution = milp.solve(program) if stages else None
    if solution is None or -solution.cost < num_layers * (1 - 1e-9):
        return []
    prices = [-dual for dual in solution.row_duals]
    worth = [stage.layers - sum(prices[k] for lane in stage.lanes for k in lane.kinds) for stage in stages]
    order = sorted(range(len(stages)), key=lambda i: (-worth[i], i))
    return [stages[i] for i in order[:_MAX_STAGES]]


def _cover(
    kinds: Sequence[Kind], num_layers: int, stages: Sequence[LaneStage], seed: int
) -> tuple[LaneStage, ...] | None:
    if not stages:
        return None
    program = _program(kinds, stages, integer=True)
    program.row(range(len(stages)), [stage.layers for stage in stages], lower=num_layers)
    solution = milp.solve(program, time_limit_s=_PROBE_S, seed=seed, node_limit=_NODES)
    if solution is None:
        return None
    return tuple(stage for stage, times in zip(stages, solution.values, strict=True) for _ in range(round(times)))


def _program(kinds: Sequence[Kind], stages: Sequence[LaneStage], *, integer: bool) -> milp.Program:
    """How often to take each stage, with the nodes there are of each kind."""
    program = milp.Program()
    using: list[dict[int, int]] = [{} for _ in kinds]
    for i, stage in enumerate(stages):
        program.column(0.0, integer=integer)
        for lane in stage.lanes:
            for k in lane.kinds:
                using[k][i] = using[k].get(i, 0) + 1
    for kind, used in zip(kinds, using, strict=True):
        program.row(list(used), [float(times) for times in used.values()], upper=len(kind.nodes))
    return program
