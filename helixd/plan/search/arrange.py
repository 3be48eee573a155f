"""Which stage follows which, and which of several like nodes stands where, so that links carry the flow between.

The stage covering looks at no links. Here its stages are put in an order and nodes trade places, by annealing over
`energy = sum over neighbouring stages of max(0, wanted flow - what the links between them carry)`. A stage is lanes,
side by side: a node that holds all of its layers, or several that hold them one after the other. A move changes few
neighbourhoods and what two stages carry is remembered, so tens of thousands of moves take a second. Regions with slow
links between them and clusters where a node sees only some others are the same problem here.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import exp
from random import Random

from helixd.ids import NodeId
from helixd.layers import LayerRange
from helixd.plan.cluster.spec import COORDINATOR
from helixd.plan.graph.flow import FlowModel, node_capacity
from helixd.plan.holding import Holding

# A stage wider than this is judged by a bound on what its links carry, not exactly.
_EXACT_WIDTH = 6
# Shares of the moves: that change the order, that start beside a gap, that are not tried with a node of another kind.
_ORDER, _FOCUS, _ALIKE = 0.5, 0.6, 0.8
# The temperature at first, as a share of the wanted flow, and at the end, as a share of that. What counts is to stay
# near a few hundredths of the flow for long: warmer than that nothing is found, colder nothing is left again.
_WARM, _COLD = 0.05, 0.3

Members = tuple[NodeId, ...]
# A stage: its lanes, each of nodes with the layers that they hold of it, first to last.
Lanes = tuple[tuple[tuple[NodeId, int], ...], ...]


def stages_of(placement: Mapping[NodeId, LayerRange]) -> list[Lanes] | None:
    """A placement as stages, cut wherever no range reaches across; None where a stage is not made of whole lanes."""
    by_start: dict[int, list[tuple[NodeId, LayerRange]]] = {}
    for node, held in sorted(placement.items(), key=lambda entry: (entry[1], entry[0])):
        by_start.setdefault(held.start, []).append((node, held))
    stages: list[Lanes] = []
    start, last = 0, max((held.end for held in placement.values()), default=0)
    while start < last:
        lanes: list[list[tuple[NodeId, LayerRange]]] = [[entry] for entry in by_start.pop(start, [])]
        while len(ends := {lane[-1][1].end for lane in lanes}) > 1:
            shortest = min(lanes, key=lambda lane: lane[-1][1].end)
            following = by_start.get(shortest[-1][1].end)
            if not following:
                return None
            shortest.append(following.pop(0))
        if not lanes:
            return None
        stages.append(tuple(tuple((node, len(held)) for node, held in lane) for lane in lanes))
        start = ends.pop()
    if any(by_start.values()):
        return None
    return stages


class Arrangement:
    """Stages of one cluster whose order and nodes are to be chosen. Same seed, same result."""

    def __init__(self, holding: Holding, flows: FlowModel, stages: Sequence[Lanes], flow: float) -> None:
        self._holding = holding
        self._flows = flows
        self._flow = flow
        # Of each stage the layers that its nodes hold, lane by lane; stages of one shape are interchangeable.
        shapes = [tuple(tuple(layers for _, layers in lane) for lane in lanes) for lanes in stages]
        self._shapes = shapes
        self._shape_of = [shapes.index(shape) for shape in shapes]
        self._own = [[layers for lane in shape for layers in lane] for shape in shapes]
        self._members = [[node for lane in lanes for node, _ in lane] for lanes in stages]
        self._order = list(range(len(stages)))
        used = {node for nodes in self._members for node in nodes}
        self._spare = [node.id for node in holding.usable() if node.id not in used and not holding.must_hold(node.id)]
        self._nodes = {node.id: node for node in holding.spec.nodes}
        self._carries: dict[tuple[int, Members, int, Members], float] = {}
        self._sides: dict[tuple[int, Members], _Sides] = {}
        self._capacity: dict[tuple[NodeId, int], float] = {}
        self._kind = {node: (spec.profile.type, spec.profile.max_layers) for node, spec in self._nodes.items()}
        self._gaps: list[float] = []
        self._change = 0.0

    def anneal(self, moves: int, *, seed: int = 0, out_of_time: Callable[[], bool] = lambda: False) -> float:
        """Rearrange; returns the energy left (0: every neighbourhood carries the wanted flow)."""
        random = Random(seed)  # noqa: S311
        self._gaps = [self._gap(at) for at in range(len(self._order) + 1)]
        energy = sum(self._gaps) + sum(self._lack(stage) for stage in self._order)
        best, kept = energy, self._snapshot()
        for move in range(moves):
            if best <= 1e-9 * self._flow or (move % 256 == 0 and out_of_time()):
                break
            warmth = self._flow * _WARM * _COLD ** (move / moves)
            change = self._try_move(random, warmth)
            energy += change
            if energy < best - 1e-9:
                best, kept = energy, self._snapshot()
        self._order, self._members, self._spare = kept
        return best

    def placement(self) -> dict[NodeId, LayerRange]:
        """The arrangement as ranges; empty if an end of the model does not fit the nodes that stand there."""
        ranges: dict[NodeId, LayerRange] = {}
        start = 0
        for stage in self._order:
            members = iter(self._members[stage])
            at = start
            for lane in self._shapes[stage]:
                at = start
                for layers in lane:
                    node, held = next(members), LayerRange(at, at + layers)
                    at = held.end
                    if not self._holding.allows(node, held):
                        return {}
                    ranges[node] = held
            start = at
        return ranges

    def _snapshot(self) -> tuple[list[int], list[list[NodeId]], list[NodeId]]:
        return list(self._order), [list(nodes) for nodes in self._members], list(self._spare)

    def _try_move(self, random: Random, warmth: float) -> float:
        """Make one random move if it helps, or by chance; the energy's change."""
        count = len(self._order)
        kind = random.random()
        if count > 1 and kind < _ORDER * 0.7:
            first, length = self._place(random), 1 + (random.random() < 0.3) + (random.random() < 0.1)
            to = random.randrange(count)
            segment = self._order[first : first + length]
            rest = self._order[:first] + self._order[first + length :]
            order = rest[:to] + segment + rest[to:]
            return self._reorder(order, random, warmth)
        if count > 1 and kind < _ORDER:
            a, b = self._place(random), random.randrange(count)
            order = list(self._order)
            order[a], order[b] = order[b], order[a]
            return self._reorder(order, random, warmth)
        return self._trade(random, warmth)

    def _place(self, random: Random) -> int:
        """The position of a stage: mostly one beside a gap, where something has to change."""
        count = len(self._order)
        if random.random() < _FOCUS:
            gaps = [at for at, gap in enumerate(self._gaps) if gap > 0]
            if gaps:
                at = gaps[random.randrange(len(gaps))] - (random.random() < 0.5)
                return min(max(at, 0), count - 1)
        return random.randrange(count)

    def _reorder(self, order: list[int], random: Random, warmth: float) -> float:
        old = self._order
        if order == old:
            return 0.0
        count = len(order)
        changed = [
            at
            for at in range(count + 1)
            if (at > 0 and order[at - 1] != old[at - 1]) or (at < count and order[at] != old[at])
        ]
        self._order = order
        if self._settle(changed, 0.0, warmth, random):
            return self._change
        self._order = old
        return 0.0

    def _trade(self, random: Random, warmth: float) -> float:
        """Two nodes of different stages, or a used and a spare one, change places."""
        at = self._place(random)
        stage = self._order[at]
        mine = self._members[stage]
        i = random.randrange(len(mine))
        other_at: int | None = None
        if self._spare and random.random() < 0.2:
            theirs = self._spare
        else:
            other_at = random.randrange(len(self._order))
            if other_at == at:
                return 0.0
            theirs = self._members[self._order[other_at]]
        j = random.randrange(len(theirs))
        a, b = mine[i], theirs[j]
        # Of unlike nodes one is mostly too slow for the other's place.
        if self._kind[a] != self._kind[b] and random.random() < _ALIKE:
            like = [k for k, node in enumerate(theirs) if self._kind[node] == self._kind[a]]
            if not like:
                return 0.0
            j = like[random.randrange(len(like))]
            b = theirs[j]
        if not self._may_hold(b, self._own[stage][i]):
            return 0.0
        if other_at is not None and not self._may_hold(a, self._own[self._order[other_at]][j]):
            return 0.0
        gaps = {at, at + 1} | (set() if other_at is None else {other_at, other_at + 1})
        touched = [stage] if other_at is None else [stage, self._order[other_at]]
        lack = sum(self._lack(s) for s in touched)
        mine[i], theirs[j] = b, a
        lack = sum(self._lack(s) for s in touched) - lack
        if self._settle(sorted(gaps), lack, warmth, random):
            return self._change
        mine[i], theirs[j] = a, b
        return 0.0

    def _settle(self, places: Sequence[int], more: float, warmth: float, random: Random) -> bool:
        """Whether the change made at these places stays; `more`: what it costs besides their gaps."""
        new = [self._gap(at) for at in places]
        self._change = sum(new) - sum(self._gaps[at] for at in places) + more
        if not _accept(self._change, warmth, random):
            return False
        for at, gap in zip(places, new, strict=True):
            self._gaps[at] = gap
        return True

    def _may_hold(self, node: NodeId, layers: int) -> bool:
        return self._holding.min_layers(node) <= layers <= self._holding.max_layers(node)

    def _rate(self, node: NodeId, layers: int) -> float:
        found = self._capacity.get((node, layers))
        if found is None:
            found = self._capacity[node, layers] = node_capacity(self._holding.spec, self._nodes[node], layers)
        return found

    def _sides_of(self, stage: int) -> "_Sides":
        """What a stage's lanes carry, and the nodes at which they begin and end."""
        key = (self._shape_of[stage], tuple(self._members[stage]))
        found = self._sides.get(key)
        if found is None:
            link = self._flows.link_capacity
            members = iter(key[1])
            rates, firsts, lasts = [], [], []
            for lane in self._shapes[stage]:
                nodes = [next(members) for _ in lane]
                rate = min(self._rate(node, layers) for node, layers in zip(nodes, lane, strict=True))
                rates.append(min([rate, *(link(u, v) for u, v in pairwise(nodes))]))
                firsts.append(nodes[0])
                lasts.append(nodes[-1])
            shape = self._shapes[stage]
            found = self._sides[key] = _Sides(
                tuple(rates), tuple(firsts), tuple(lasts),
                tuple(lane[0] for lane in shape), tuple(lane[-1] for lane in shape),
            )  # fmt: skip
        return found

    def _lack(self, stage: int) -> float:
        """What a stage's own lanes are short of."""
        return max(0.0, self._flow - sum(self._sides_of(stage).rates))

    def _gap(self, at: int) -> float:
        """What is missing between the stages before and after position `at`; the coordinator is beyond both ends."""
        if at == 0:
            return self._end_gap(self._order[0], inward=True)
        if at == len(self._order):
            return self._end_gap(self._order[-1], inward=False)
        p, q = self._order[at - 1], self._order[at]
        key = (self._shape_of[p], tuple(self._members[p]), self._shape_of[q], tuple(self._members[q]))
        carried = self._carries.get(key)
        if carried is None:
            carried = self._carries[key] = self._transport(self._sides_of(p), self._sides_of(q))
        return max(0.0, self._flow - carried)

    def _end_gap(self, stage: int, *, inward: bool) -> float:
        sides, link = self._sides_of(stage), self._flows.link_capacity
        nodes, own = (sides.firsts, sides.first_layers) if inward else (sides.lasts, sides.last_layers)
        carried = sum(
            min(rate, link(COORDINATOR, node) if inward else link(node, COORDINATOR))
            for rate, node in zip(sides.rates, nodes, strict=True)
        )
        unheld = sum(
            not self._holding.max_layers(node, first=inward, last=not inward) >= layers
            for node, layers in zip(nodes, own, strict=True)
        )
        return max(0.0, self._flow - carried) + unheld * self._flow

    def _transport(self, before: "_Sides", after: "_Sides") -> float:
        """Most that one stage can hand to the next: the least cut, over the subsets of the smaller side."""
        link = self._flows.link_capacity
        out, into = list(before.rates), list(after.rates)
        rows = [[link(u, v) for v in after.firsts] for u in before.lasts]
        if len(into) < len(out):
            out, into = into, out
            rows = [list(column) for column in zip(*rows, strict=True)]
        if len(out) > _EXACT_WIDTH:
            reached = sum(min(rate, sum(row[v] for row in rows)) for v, rate in enumerate(into))
            return min(sum(out), reached, sum(min(rate, sum(row)) for rate, row in zip(out, rows, strict=True)))
        least = float("inf")
        for subset in range(1 << len(out)):
            cut = sum(rate for u, rate in enumerate(out) if not subset >> u & 1)
            inside = [row for u, row in enumerate(rows) if subset >> u & 1]
            cut += sum(min(rate, sum(row[v] for row in inside)) for v, rate in enumerate(into))
            least = min(least, cut)
        return least


@dataclass(frozen=True, slots=True)
class _Sides:
    """A stage as its neighbours see it, by lane: what it carries, its first and last node and the layers they hold."""

    rates: tuple[float, ...]
    firsts: Members
    lasts: Members
    first_layers: tuple[int, ...]
    last_layers: tuple[int, ...]


def _accept(change: float, warmth: float, random: Random) -> bool:
    return change <= 0 or (warmth > 0 and random.random() < exp(-change / warmth))
