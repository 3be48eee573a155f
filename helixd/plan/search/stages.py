"""Placement as a covering problem: cut the model into stages, put enough nodes on each. Links are not looked at.

A stage is a run of j layers held by a multiset of nodes whose T(j) add up to the wanted flow. HiGHS picks stages so
that they cover all layers with the nodes there are; equal nodes are one kind, so the program stays small however
many nodes there are. The fewest stages that reach a flow give the flow/depth frontier.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from helixd.ids import NodeId
from helixd.layers import LayerRange
from helixd.plan import milp
from helixd.plan.graph.flow import node_capacity
from helixd.plan.holding import Holding

_MAX_PATTERNS = 6000
_PROBES = 14
_RELAXED_PROBES = 9
_FIRST_STEP = 0.02


@dataclass(frozen=True, slots=True)
class Kind:
    """Nodes that can stand for each other: same T(j) and same limits (`most[first][last]`, `fewest` layers)."""

    nodes: tuple[NodeId, ...]
    capacity: tuple[float, ...]
    most: tuple[tuple[int, int], tuple[int, int]]
    fewest: int

    def holds(self, layers: int, first: bool, last: bool) -> bool:
        """Whether such a node may hold a stage of that many layers at that place."""
        return self.fewest <= layers <= self.most[int(first)][int(last)]


@dataclass(frozen=True, slots=True)
class Stage:
    """`layers` layers held by `counts[k]` nodes of kind k; `first` and `last` where it must stand."""

    layers: int
    counts: tuple[int, ...]
    first: bool = False
    last: bool = False

    def flow(self, kinds: Sequence[Kind]) -> float:
        """Tokens/s through all its nodes together."""
        return sum(
            count * kind.capacity[self.layers - 1] for count, kind in zip(self.counts, kinds, strict=True) if count
        )


def kinds_of(holding: Holding) -> tuple[Kind, ...]:
    """The free nodes (not pinned to a range) by what they can do."""
    spec = holding.spec
    found: dict[tuple[object, ...], list[NodeId]] = {}
    for node in holding.usable():
        if node.fixed_range is not None:
            continue
        longest = holding.max_layers(node.id)
        most = tuple(
            tuple(holding.max_layers(node.id, first=first, last=last) for last in (False, True))
            for first in (False, True)
        )
        curve = tuple(node_capacity(spec, node, layers) for layers in range(1, longest + 1))
        found.setdefault((curve, most, holding.min_layers(node.id)), []).append(node.id)
    return tuple(
        Kind(tuple(nodes), curve, most, fewest)  # type: ignore[arg-type]
        for (curve, most, fewest), nodes in found.items()
    )


def few_kinds(kinds: Sequence[Kind], limit: int = 8) -> tuple[Kind, ...]:
    """The kinds, the most alike ones taken together until there are at most `limit`.

    A merged kind promises what its weakest member can do, so plans stay valid; machines measured one by one are all
    a little different, and the program grows steeply with the kinds.
    """
    merged = sorted(kinds, key=lambda kind: (kind.most, kind.capacity, kind.nodes))
    while len(merged) > limit:
        at = min(range(len(merged) - 1), key=lambda i: _unlikeness(merged[i], merged[i + 1]))
        merged[at : at + 2] = [_weakest_of(merged[at], merged[at + 1])]
    return tuple(merged)


def _weakest_of(a: Kind, b: Kind) -> Kind:
    most = tuple(tuple(min(a.most[f][last], b.most[f][last]) for last in (0, 1)) for f in (0, 1))
    capacity = tuple(min(pair) for pair in zip(a.capacity, b.capacity, strict=False))
    return Kind(a.nodes + b.nodes, capacity, most, max(a.fewest, b.fewest))  # type: ignore[arg-type]


def _unlikeness(a: Kind, b: Kind) -> float:
    """What is lost by taking two kinds for the weaker of them: nodes times ratio of work and of room."""
    together = _weakest_of(a, b)
    worth = max((j * rate for j, rate in enumerate(together.capacity, 1)), default=0.0)
    lost = 0.0
    for kind in (a, b):
        own = max(j * rate for j, rate in enumerate(kind.capacity, 1))
        lost += len(kind.nodes) * (1 - worth / own if own > 0 else 0.0)
        lost += len(kind.nodes) * (1 - together.most[0][0] / kind.most[0][0])
    return lost


def cover(
    kinds: Sequence[Kind],
    num_layers: int,
    flow: float,
    *,
    min_width: int = 1,
    fewest: bool = False,
    wide: int = 0,
    seed: int = 0,
    time_limit_s: float = 2.0,
) -> tuple[Stage, ...] | None:
    """Stages of at least `flow` tokens/s each that cover `num_layers` layers or a few more; None if none are found.

    `min_width`: at least so many nodes in each stage. `fewest`: with as few stages as possible. `wide`: at least so
    many stages of several nodes, such as slow links between regions need on both their sides.
    """
    made = _cover_program(kinds, num_layers, flow, min_width=min_width, fewest=fewest, wide=wide)
    if made is None:
        return None
    stages, program = made
    solution = milp.solve(program, time_limit_s=time_limit_s, seed=seed, node_limit=2000)
    if solution is None:
        return None
    return tuple(stage for stage, times in zip(stages, solution.values, strict=True) for _ in range(round(times)))


def _cover_program(
    kinds: Sequence[Kind], num_layers: int, flow: float, *, min_width: int, fewest: bool, wide: int
) -> tuple[list[Stage], milp.Program] | None:
    """All stages that carry `flow`, and how often to take each; None if there is no such stage."""
    ends = any(kind.most[first][last] != kind.most[0][0] for kind in kinds for first in (0, 1) for last in (0, 1))
    places = ((False, False), (True, False), (False, True), (True, True)) if ends else ((False, False),)
    stages = [stage for first, last in places for stage in _stages(kinds, num_layers, flow, min_width, first, last)]
    if not stages:
        return None
    program = milp.Program()
    for stage in stages:
        program.column(1.0 if fewest else -float(stage.layers), upper=num_layers, integer=True)
    everything = range(len(stages))
    program.row(everything, [stage.layers for stage in stages], lower=num_layers)
    for k, kind in enumerate(kinds):
        using = [i for i in everything if stages[i].counts[k]]
        program.row(using, [stages[i].counts[k] for i in using], upper=len(kind.nodes))
    if wide:
        pairs = [i for i in everything if sum(stages[i].counts) > 1]
        program.row(pairs, [1.0] * len(pairs), lower=wide)
    if ends:
        for firsts in ([i for i in everything if stages[i].first], [i for i in everything if stages[i].last]):
            program.row(firsts, [1.0] * len(firsts), lower=1, upper=1)
    if not fewest:
        # Any cover will do: what goes far beyond the last layer is no better.
        program.rows[0] = (num_layers, num_layers + max(stage.layers for stage in stages), *program.rows[0][2:])
        program.cost = [0.0] * len(stages)
    return stages, program


def best_cover(
    kinds: Sequence[Kind],
    num_layers: int,
    bound: float,
    *,
    min_width: int = 1,
    wide: int = 0,
    seed: int = 0,
    precision: float = 1e-4,
    out_of_time: Callable[[], bool] = lambda: False,
) -> tuple[float, tuple[Stage, ...]] | None:
    """The largest flow that stages reach (found by bisection below `bound`, to `precision` of it), and the stages."""
    found: tuple[Stage, ...] | None = cover(kinds, num_layers, bound, min_width=min_width, wide=wide, seed=seed)
    if found is not None:
        return bound, found
    low, high = 0.0, _relaxed_best(kinds, num_layers, bound, min_width=min_width, wide=wide)
    for probe in range(_PROBES):
        if (probe and out_of_time()) or high - low < precision * high:
            break
        # Whole stages come near to what stages in fractions reach.
        middle = high - (high - low) * (_FIRST_STEP if probe == 0 else 0.5)
        stages = cover(kinds, num_layers, middle, min_width=min_width, wide=wide, seed=seed)
        if stages is None:
            high = middle
        else:
            # Stages often carry more than they were asked for.
            found = stages
            low = max(middle, min(stage.flow(kinds) for stage in stages))
            high = max(high, low)
    return None if found is None else (low, found)


def _relaxed_best(kinds: Sequence[Kind], num_layers: int, bound: float, *, min_width: int, wide: int) -> float:
    """A flow that stages do not exceed: where even fractions of stages do not cover the layers. Cheaper to find."""
    low, high = 0.0, bound
    for _ in range(_RELAXED_PROBES):
        middle = (low + high) / 2
        made = _cover_program(kinds, num_layers, middle, min_width=min_width, fewest=False, wide=wide)
        if made is not None:
            made[1].integer = [False] * len(made[0])
        if made is None or milp.solve(made[1]) is None:
            high = middle
        else:
            low = middle
    return high


def lay_out(stages: Sequence[Stage], kinds: Sequence[Kind], num_layers: int) -> dict[NodeId, LayerRange]:
    """Stages as ranges: surplus layers are trimmed where the flow is weakest, left-over nodes join weak stages."""
    lengths = [stage.layers for stage in stages]
    counts = [list(stage.counts) for stage in stages]

    def carried(i: int, layers: int) -> float:
        return sum(n * kind.capacity[layers - 1] for n, kind in zip(counts[i], kinds, strict=True) if n)

    def may(i: int, layers: int) -> bool:
        stage = stages[i]
        return layers >= 1 and all(
            kind.holds(layers, stage.first, stage.last) for n, kind in zip(counts[i], kinds, strict=True) if n
        )

    for _ in range(sum(lengths) - num_layers):
        weakest = sorted((i for i, length in enumerate(lengths) if length), key=lambda i: (carried(i, lengths[i]), i))
        cut = next((i for i in weakest if may(i, lengths[i] - 1)), None)
        if cut is None:
            cut = next((i for i in weakest if lengths[i] == 1 and not (stages[i].first or stages[i].last)), None)
            if cut is None:
                return {}
        lengths[cut] -= 1
    spare = [
        len(kind.nodes) - sum(count[k] for count, length in zip(counts, lengths, strict=True) if length)
        for k, kind in enumerate(kinds)
    ]
    for k in sorted(range(len(kinds)), key=lambda k: -max(kinds[k].capacity, default=0.0)):
        for _ in range(spare[k]):
            fitting = [
                i
                for i, stage in enumerate(stages)
                if lengths[i] and kinds[k].holds(lengths[i], stage.first, stage.last)
            ]
            if not fitting:
                break
            counts[min(fitting, key=lambda i: (carried(i, lengths[i]), i))][k] += 1
    order = sorted(range(len(stages)), key=lambda i: (not stages[i].first, stages[i].last, -lengths[i], i))
    unused = [list(kind.nodes) for kind in kinds]
    placement: dict[NodeId, LayerRange] = {}
    start = 0
    for i in order:
        if not lengths[i]:
            continue
        held = LayerRange(start, start + lengths[i])
        start = held.end
        for k, count in enumerate(counts[i]):
            for _ in range(count):
                placement[unused[k].pop(0)] = held
    return placement


def _stages(
    kinds: Sequence[Kind], num_layers: int, flow: float, min_width: int, first: bool, last: bool
) -> list[Stage]:
    """All minimal multisets of nodes that carry `flow` over j layers, for each j."""
    longest = max((kind.most[int(first)][int(last)] for kind in kinds), default=0)
    lengths = (num_layers,) if first and last else range(1, min(longest, num_layers) + 1)
    budget = max(50, _MAX_PATTERNS // max(1, len(lengths)))
    stages: list[Stage] = []
    for layers in lengths:
        able = [k for k, kind in enumerate(kinds) if kind.holds(layers, first, last)]
        able.sort(key=lambda k: -kinds[k].capacity[layers - 1])
        rates = [kinds[k].capacity[layers - 1] for k in able]
        room = [len(kinds[k].nodes) for k in able]
        for found, picked in enumerate(_minimal(rates, room, flow, min_width)):
            counts = [0] * len(kinds)
            for k, count in zip(able, picked, strict=True):
                counts[k] = count
            stages.append(Stage(layers, tuple(counts), first, last))
            if found >= budget:
                break
    return stages


def _minimal(rates: Sequence[float], room: Sequence[int], flow: float, min_width: int) -> Iterator[tuple[int, ...]]:
    """Multisets with rates (falling) adding up to `flow` from which none can be left out; fewest of the weak last."""
    wanted = flow * (1 - 1e-9)

    def extend(at: int, picked: tuple[int, ...], missing: float, width: int) -> Iterator[tuple[int, ...]]:
        if missing <= 0 and width >= min_width:
            yield picked + (0,) * (len(rates) - at)
            return
        if at == len(rates) or rates[at] <= 0:
            return
        needed = max(0, min_width - width)
        if missing > 0:
            needed = max(needed, min(room[at] + 1, int(missing / rates[at]) + (missing % rates[at] > 0)))
        for count in range(min(needed, room[at]), -1, -1):
            yield from extend(at + 1, (*picked, count), missing - count * rates[at], width + count)

    yield from extend(0, (), wanted, 0)
