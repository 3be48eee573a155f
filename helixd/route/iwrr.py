"""Interleaved weighted round robin: draws whose shares follow given weights, evenly mixed, under masks.

Every candidate has a credit. A draw of some cost gives the cost out as credit in proportion to the weights of the
candidates that may be drawn, and takes it from the one with most credit. So after any number of unmasked draws each
candidate is within a few draws of its exact share. Who is masked neither gains nor loses, so a node that comes back
is not flooded.
"""

from collections.abc import Collection, Mapping

from helixd.ids import NodeId


class WeightedRoundRobin:
    """The draws of one vertex. Not random: the same calls give the same draws.

    Raises ValueError for weights that are not positive.
    """

    __slots__ = ("_credit", "_given", "_largest_cost", "_taken", "_total", "_weights")

    def __init__(self, weights: Mapping[NodeId, float]) -> None:
        for node, weight in weights.items():
            if not weight > 0:
                raise ValueError(f"weight of {node} must be positive, is {weight}")
        self._weights = dict(weights)
        self._total = sum(self._weights.values())
        self._credit = dict.fromkeys(weights, 0.0)
        self._largest_cost = 0.0
        # What was charged among everybody since credits were last settled: decode steps are many, draws are few.
        self._given = 0.0
        self._taken: dict[NodeId, float] = {}

    def choose(
        self,
        allowed: Collection[NodeId],
        cost: float = 1.0,
        load: Mapping[NodeId, float] | None = None,
        slack: float = 0.0,
    ) -> NodeId:
        """Who of `allowed` is next for work of that cost. Raises ValueError if nobody is allowed.

        Between candidates whose credit is within `slack` of the best, the one of least `load` is taken.
        """
        self._settle()
        total = sum(self._weights[node] for node in allowed)
        if total <= 0:
            raise ValueError("nobody may be drawn")
        elsewhere = load or {}
        # Rounded, so that equal credits are equal; then heavier first and by id, so that draws are the same everywhere.
        credit = {node: round(self._credit[node] / cost + self._weights[node] / total, 6) for node in allowed}
        if slack > 0:
            least = max(credit.values()) - slack / cost
            credit = {node: min(had, least) for node, had in credit.items()}
        return min(
            allowed, key=lambda node: (-credit[node], elsewhere.get(node, 0.0), -self._weights[node], node)
        )  # fmt: skip

    def charge(self, node: NodeId, allowed: Collection[NodeId], cost: float = 1.0) -> None:
        """Account work of that cost to `node`, drawn among `allowed`."""
        self._largest_cost = max(self._largest_cost, cost)
        sharing = {*allowed, node}
        if len(sharing) == len(self._weights):
            self.follow(node, cost)
            return
        self._settle()
        total = sum(self._weights[other] for other in sharing)
        for other in sharing:
            self._credit[other] += cost * self._weights[other] / total
        self._credit[node] -= cost

    def follow(self, node: NodeId, cost: float = 1.0) -> None:
        """Account work of that cost to `node`, which an earlier draw chose (decode steps). In constant time."""
        self._given += cost
        self._taken[node] = self._taken.get(node, 0.0) + cost

    def _settle(self) -> None:
        if self._given:
            for node, weight in self._weights.items():
                self._credit[node] += self._given * weight / self._total - self._taken.get(node, 0.0)
            self._given = 0.0
            self._taken.clear()
        # Long masks with decode load running would let credit grow without end, and then starve or flood a node.
        limit = (len(self._weights) + 1) * max(1.0, self._largest_cost)
        for node, credit in self._credit.items():
            if not -limit <= credit <= limit:
                self._credit[node] = min(limit, max(-limit, credit))
