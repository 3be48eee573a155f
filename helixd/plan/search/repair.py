"""Local search by the true max flow: what the covering view cannot see (links, regions, partial connectivity).

Moves: another range for one node, two nodes trading ranges, a boundary between stages shifted. The number of flows
computed is bounded, not the time, so that a seed gives the same plan on any machine.
"""

from collections.abc import Callable, Iterator, Mapping
from random import Random

from helixd.ids import NodeId
from helixd.layers import LayerRange
from helixd.plan.graph.flow import FlowModel
from helixd.plan.holding import Holding

Placement = dict[NodeId, LayerRange]


def improve(
    holding: Holding,
    flows: FlowModel,
    placement: Mapping[NodeId, LayerRange],
    *,
    evaluations: int,
    goal: float = float("inf"),
    seed: int = 0,
    out_of_time: Callable[[], bool] = lambda: False,
) -> tuple[Placement, float]:
    """A placement of at least the given one's flow, and its flow; stops at `goal` or when nothing near is better."""
    random = Random(seed)  # noqa: S311
    best = dict(sorted(placement.items()))
    best_flow = flows.value(best)
    left = evaluations
    while left > 0 and best_flow < goal * (1 - 1e-9):
        for tried in _neighbours(holding, best, random):
            left -= 1
            if left < 0 or out_of_time():
                return best, best_flow
            flow = flows.value(tried)
            if flow > best_flow * (1 + 1e-9):
                best, best_flow = tried, flow
                break
        else:
            return best, best_flow
    return best, best_flow


def _neighbours(holding: Holding, placement: Placement, random: Random) -> Iterator[Placement]:
    """Placements one move away, in random order within each kind of move; cheap and promising kinds first."""
    yield from _shifted(holding, placement, random)
    yield from _swapped(holding, placement, random)
    yield from _moved(holding, placement, random)


def _shifted(holding: Holding, placement: Placement, random: Random) -> Iterator[Placement]:
    boundaries = sorted({held.end for held in placement.values()} | {held.start for held in placement.values()})
    moves = [(at, to) for at in boundaries for to in (at - 1, at + 1) if 0 < at < holding.num_layers]
    random.shuffle(moves)
    for at, to in moves:
        moved: Placement = {}
        for node, held in placement.items():
            start = to if held.start == at else held.start
            end = to if held.end == at else held.end
            if not 0 <= start < end <= holding.num_layers:
                break
            if (start, end) != held.to_pair():
                changed = LayerRange(start, end)
                if not holding.allows(node, changed):
                    break
                moved[node] = changed
        else:
            yield placement | moved


def _swapped(holding: Holding, placement: Placement, random: Random) -> Iterator[Placement]:
    everyone = [node.id for node in holding.usable()]
    pairs = [(a, b) for i, a in enumerate(everyone) for b in everyone[:i] if placement.get(a) != placement.get(b)]
    random.shuffle(pairs)
    for a, b in pairs:
        traded = dict(placement)
        for node, held in ((a, placement.get(b)), (b, placement.get(a))):
            if held is None:
                if holding.must_hold(node):
                    break
                traded.pop(node, None)
            elif holding.allows(node, held):
                traded[node] = held
            else:
                break
        else:
            yield dict(sorted(traded.items()))


def _moved(holding: Holding, placement: Placement, random: Random) -> Iterator[Placement]:
    moves = [
        (node.id, held)
        for node in holding.usable()
        for held in holding.options(node.id)
        if placement.get(node.id) != held
    ]
    random.shuffle(moves)
    for node, held in moves:
        yield dict(sorted((placement | {node: held}).items()))
