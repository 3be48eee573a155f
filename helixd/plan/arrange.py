"""Which stage follows which, and which of several like nodes stands where, so that links carry the flow between.

The stage covering looks at no links. Here its stages are put in an order and nodes trade places, by annealing over
`energy = sum over neighbouring stages of max(0, wanted flow - what the links between them carry)`. A move changes few
neighbourhoods and what two stages carry is remembered, so tens of thousands of moves take a second. Regions with slow
links between them and clusters where a node sees only some others are the same problem here.
"""

from collections.abc import Callable, Sequence
from math import exp
from random import Random

from helixd.ids import NodeId
from helixd.layers import LayerRange
from helixd.plan.flow import FlowModel, node_capacity
from helixd.plan.holding import Holding
from helixd.plan.spec import COORDINATOR

# A stage wider than this is judged by a bound on what its links carry, not exactly.
_EXACT_WIDTH = 6
# Shares of the moves: that change the order, that start beside a gap, that are not tried with a node of another kind.
_ORDER, _FOCUS, _ALIKE = 0.5, 0.6, 0.8
# The temperature at first, as a share of the wanted flow, and at the end, as a share of that. What counts is to stay
# near a few hundredths of the flow for long: warmer than that nothing is found, colder nothing is left again.
_WARM, _COLD = 0.05, 0.3

Members = tuple[NodeId, ...]


class Arrangement:
    """Stages of one cluster, as (layers, nodes), whose order and nodes are to be chosen. Same seed, same result."""

    def __init__(self, holding: Holding, flows: FlowModel, stages: Sequence[tuple[int, Members]], flow: float) -> None:
        self._holding = holding
        self._flows = flows
        self._flow = flow
        self._lengths = [layers for layers, _ in stages]
        self._members = [list(nodes) for _, nodes in stages]
        self._order = list(range(len(stages)))
        used = {node for _, nodes in stages for node in nodes}
        self._spare = [node.id for node in holding.usable() if node.id not in used and not holding.must_hold(node.id)]
        self._nodes = {node.id: node for node in holding.spec.nodes}
        self._carries: dict[tuple[int, Members, int, Members], float] = {}
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
            held = LayerRange(start, start + self._lengths[stage])
            start = held.end
            for node in self._members[stage]:
                if not self._holding.allows(node, held):
                    return {}
                ranges[node] = held
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
        if not self._may_hold(b, self._lengths[stage]):
            return 0.0
        if other_at is not None and not self._may_hold(a, self._lengths[self._order[other_at]]):
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

    def _lack(self, stage: int) -> float:
        """What a stage's own nodes are short of."""
        layers = self._lengths[stage]
        return max(0.0, self._flow - sum(self._rate(node, layers) for node in self._members[stage]))

    def _gap(self, at: int) -> float:
        """What is missing between the stages before and after position `at`; the coordinator is beyond both ends."""
        if at == 0:
            return self._end_gap(self._order[0], inward=True)
        if at == len(self._order):
            return self._end_gap(self._order[-1], inward=False)
        p, q = self._order[at - 1], self._order[at]
        key = (self._lengths[p], tuple(self._members[p]), self._lengths[q], tuple(self._members[q]))
        carried = self._carries.get(key)
        if carried is None:
            carried = self._carries[key] = self._transport(*key)
        return max(0.0, self._flow - carried)

    def _end_gap(self, stage: int, *, inward: bool) -> float:
        layers = self._lengths[stage]
        carried = sum(
            min(
                self._rate(node, layers),
                self._flows.link_capacity(COORDINATOR, node)
                if inward
                else self._flows.link_capacity(node, COORDINATOR),
            )
            for node in self._members[stage]
        )
        unheld = sum(
            not self._holding.max_layers(node, first=inward, last=not inward) >= layers for node in self._members[stage]
        )
        return max(0.0, self._flow - carried) + unheld * self._flow

    def _transport(self, layers: int, senders: Members, next_layers: int, receivers: Members) -> float:
        """Most that `senders` can hand to `receivers`: the least cut, over the subsets of the smaller side."""
        link = self._flows.link_capacity
        out = [self._rate(node, layers) for node in senders]
        into = [self._rate(node, next_layers) for node in receivers]
        rows = [[link(u, v) for v in receivers] for u in senders]
        if len(receivers) < len(senders):
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


def _accept(change: float, warmth: float, random: Random) -> bool:
    return change <= 0 or (warmth > 0 and random.random() < exp(-change / warmth))
