"""Who is next: ways to choose the next hop at a vertex, behind one interface. Helix's own, and what it is held against.

A chooser decides among hops that are admissible; masks and KV room are the router's business. None of them knows a
clock: measured seconds come in as arguments, chance as a seed.
"""

from collections.abc import Callable, Collection, Mapping
from random import Random
from typing import Protocol

from helixd.ids import NodeId
from helixd.plan.plan import Hop
from helixd.route.iwrr import WeightedRoundRobin

Schedule = Mapping[NodeId, tuple[Hop, ...]]

SLACK_ENDS_AT = 0.5
"""The share of KV room taken at which hops are drawn strictly by their share of flow."""


class HopChooser(Protocol):
    """How the next hop is chosen at a vertex."""

    def choose(self, vertex: NodeId, allowed: Collection[NodeId], cost: float) -> NodeId:
        """Who of `allowed` (not empty) is next for work of that cost; changes nothing that is observable."""
        ...

    def charge(self, vertex: NodeId, chosen: NodeId, allowed: Collection[NodeId], cost: float) -> None:
        """A sequence of that cost goes that way."""
        ...

    def follow(self, vertex: NodeId, chosen: NodeId, everybody: Collection[NodeId], cost: float) -> None:
        """Decode work of that cost follows a route drawn before."""
        ...

    def prefilled(self, hop: NodeId, cost: float) -> None:
        """Work of that cost, charged when it was drawn, has been computed by `hop`."""
        ...

    def measured(self, vertex: NodeId, hop: NodeId, seconds: float) -> None:
        """How long a prompt took from leaving `vertex` to leaving `hop`."""
        ...


class FlowShares:
    """Interleaved weighted round robin in proportion to the plan's flow: Helix. Decode work counts.

    Among hops that are within `slack_tokens` of their share, the one is taken that will have done the prefill in front
    and this one first: prompts wait less, and fast nodes do more while there is little to do. The slack shrinks as
    KV fills (`fill_of` tells the share of a node's room that is taken): under load, shares give throughput.
    `queue_of`: prefill rows measured in front of a node, to go by instead of what was drawn for it.
    """

    def __init__(
        self,
        schedule: Schedule,
        sink: NodeId,
        *,
        slack_tokens: float = 0.0,
        fill_of: Callable[[NodeId], float] = lambda node: 0.0,
        queue_of: Callable[[NodeId], float] | None = None,
    ) -> None:
        self._sink = sink
        self._queue_of = queue_of
        self._slack_tokens = slack_tokens
        self._fill_of = fill_of
        self._turns = {
            vertex: WeightedRoundRobin({hop.node: hop.flow_tokens_per_s for hop in hops})
            for vertex, hops in schedule.items()
            if hops
        }
        self._through: dict[NodeId, float] = {}
        for hops in schedule.values():
            for hop in hops:
                if hop.node != sink:
                    self._through[hop.node] = self._through.get(hop.node, 0.0) + hop.flow_tokens_per_s
        self._load = dict.fromkeys(self._through, 0.0)
        self._ahead = dict.fromkeys(self._through, 0.0)

    def choose(self, vertex: NodeId, allowed: Collection[NodeId], cost: float) -> NodeId:
        """See HopChooser."""
        if len(allowed) == 1:
            return next(iter(allowed))
        slack = self._slack_tokens and self._slack_tokens * (1 - max(map(self._fill_of, allowed)) / SLACK_ENDS_AT)
        if slack > 0:
            done = {hop: self._done_s(hop, cost) for hop in allowed if hop != self._sink}
            return self._turns[vertex].choose(allowed, cost, done, slack)
        return self._turns[vertex].choose(allowed, cost, self._load)

    def charge(self, vertex: NodeId, chosen: NodeId, allowed: Collection[NodeId], cost: float) -> None:
        """See HopChooser."""
        self._turns[vertex].charge(chosen, allowed, cost)
        if chosen != self._sink:
            self._load[chosen] += cost / self._through[chosen]
            self._ahead[chosen] += cost / self._through[chosen]

    def follow(self, vertex: NodeId, chosen: NodeId, everybody: Collection[NodeId], cost: float) -> None:
        """See HopChooser."""
        self._turns[vertex].follow(chosen, cost)
        if chosen != self._sink:
            self._load[chosen] += cost / self._through[chosen]

    def prefilled(self, hop: NodeId, cost: float) -> None:
        """See HopChooser."""
        self._ahead[hop] -= cost / self._through[hop]

    def measured(self, vertex: NodeId, hop: NodeId, seconds: float) -> None:
        """See HopChooser."""

    def _done_s(self, hop: NodeId, cost: float) -> float:
        """When `hop` will have done this prefill and those in front of it, at its planned rate."""
        if self._queue_of is not None:
            return (self._queue_of(hop) + cost) / self._through[hop]
        return self._ahead[hop] + cost / self._through[hop]


class Swarm:
    """SWARM's (arXiv 2301.11913) rule as Helix's evaluation has it: each link has a priority; the smallest is next and
    rises by the moving average of the time measured over that link and its node.
    """

    def __init__(self, *, start_s: float = 0.05, keep: float = 0.8) -> None:
        self._start_s = start_s
        self._keep = keep
        self._priority: dict[tuple[NodeId, NodeId], float] = {}
        self._average_s: dict[tuple[NodeId, NodeId], float] = {}

    def choose(self, vertex: NodeId, allowed: Collection[NodeId], cost: float) -> NodeId:
        """See HopChooser."""
        return min(allowed, key=lambda hop: self._priority.get((vertex, hop), self._start_s))

    def charge(self, vertex: NodeId, chosen: NodeId, allowed: Collection[NodeId], cost: float) -> None:
        """See HopChooser."""
        link = vertex, chosen
        rise_s = self._average_s.get(link, self._start_s)
        self._priority[link] = self._priority.get(link, self._start_s) + rise_s

    def follow(self, vertex: NodeId, chosen: NodeId, everybody: Collection[NodeId], cost: float) -> None:
        """See HopChooser."""

    def prefilled(self, hop: NodeId, cost: float) -> None:
        """See HopChooser."""

    def measured(self, vertex: NodeId, hop: NodeId, seconds: float) -> None:
        """See HopChooser."""
        link = vertex, hop
        before_s = self._average_s.get(link, self._start_s)
        self._average_s[link] = self._keep * before_s + (1 - self._keep) * seconds


class RandomHop:
    """Any hop, all alike."""

    def __init__(self, seed: int) -> None:
        self._chance = Random(seed)  # noqa: S311

    def choose(self, vertex: NodeId, allowed: Collection[NodeId], cost: float) -> NodeId:
        """See HopChooser."""
        return self._chance.choice(tuple(allowed))

    def charge(self, vertex: NodeId, chosen: NodeId, allowed: Collection[NodeId], cost: float) -> None:
        """See HopChooser."""

    def follow(self, vertex: NodeId, chosen: NodeId, everybody: Collection[NodeId], cost: float) -> None:
        """See HopChooser."""

    def prefilled(self, hop: NodeId, cost: float) -> None:
        """See HopChooser."""

    def measured(self, vertex: NodeId, hop: NodeId, seconds: float) -> None:
        """See HopChooser."""


class ShortestQueue:
    """The hop with the shortest queue in front of it now, ties at random. `queue_of` tells a node's queue."""

    def __init__(self, queue_of: Callable[[NodeId], float], seed: int) -> None:
        self._queue_of = queue_of
        self._chance = Random(seed)  # noqa: S311

    def choose(self, vertex: NodeId, allowed: Collection[NodeId], cost: float) -> NodeId:
        """See HopChooser."""
        queues = [(self._queue_of(hop), hop) for hop in allowed]
        least = min(queue for queue, _ in queues)
        return self._chance.choice([hop for queue, hop in queues if queue == least])

    def charge(self, vertex: NodeId, chosen: NodeId, allowed: Collection[NodeId], cost: float) -> None:
        """See HopChooser."""

    def follow(self, vertex: NodeId, chosen: NodeId, everybody: Collection[NodeId], cost: float) -> None:
        """See HopChooser."""

    def prefilled(self, hop: NodeId, cost: float) -> None:
        """See HopChooser."""

    def measured(self, vertex: NodeId, hop: NodeId, seconds: float) -> None:
        """See HopChooser."""


class FixedRoundRobin:
    """One after the other, whatever they can carry."""

    def __init__(self) -> None:
        self._drawn: dict[tuple[NodeId, NodeId], int] = {}

    def choose(self, vertex: NodeId, allowed: Collection[NodeId], cost: float) -> NodeId:
        """See HopChooser."""
        return min(allowed, key=lambda hop: (self._drawn.get((vertex, hop), 0), hop))

    def charge(self, vertex: NodeId, chosen: NodeId, allowed: Collection[NodeId], cost: float) -> None:
        """See HopChooser."""
        self._drawn[vertex, chosen] = self._drawn.get((vertex, chosen), 0) + 1

    def follow(self, vertex: NodeId, chosen: NodeId, everybody: Collection[NodeId], cost: float) -> None:
        """See HopChooser."""

    def prefilled(self, hop: NodeId, cost: float) -> None:
        """See HopChooser."""

    def measured(self, vertex: NodeId, hop: NodeId, seconds: float) -> None:
        """See HopChooser."""
