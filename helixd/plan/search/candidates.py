"""The placements a search has found, each judged by its true max flow, and what is proven of all of them.

Knows nothing of how placements are made, nor which one will be taken.
"""

from collections.abc import Callable
from dataclasses import dataclass

from helixd.ids import NodeId
from helixd.layers import LayerRange
from helixd.plan.bounds import capacity_bound
from helixd.plan.graph.flow import Flow, FlowModel
from helixd.plan.holding import Holding
from helixd.plan.predict import Prediction, predict

# Bounds are proven to so much above what is reached.
_PROVEN = 1e-6

Placement = dict[NodeId, LayerRange]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A valid placement that carries flow; `survives`: some pipeline is left whichever one node is lost."""

    placement: Placement
    flow: Flow
    prediction: Prediction | None
    survives: bool
    method: str


class Candidates:
    """All that was found, the best flow of it, and a bound on every placement.

    `report(flow, bound, method)` is called whenever the best flow rises or the bound falls.
    """

    def __init__(
        self, holding: Holding, flows: FlowModel, report: Callable[[float, float, str], None] = lambda f, b, m: None
    ) -> None:
        self._holding = holding
        self._flows = flows
        self._found: dict[tuple[tuple[NodeId, LayerRange], ...], Candidate] = {}
        self._report = report
        self._reported = (0.0, float("inf"))
        self._method = ""
        self.best = 0.0
        self.bound = capacity_bound(holding)

    def all(self) -> list[Candidate]:
        """Every candidate, in the order in which they were found."""
        return list(self._found.values())

    def add(self, placement: Placement, method: str) -> None:
        """Judge a placement. What is not valid, carries nothing or is known already is dropped."""
        placement = dict(sorted(placement.items()))
        key = tuple(placement.items())
        if not placement or key in self._found or not self._holding.allows_all(placement):
            return
        flow = self._flows.solve(placement)
        if flow.value <= 0:
            return
        self._found[key] = Candidate(
            placement, flow, predict(self._holding, placement, flow), self._flows.survives(placement), method
        )
        if flow.value > self.best:
            self.best, self._method = flow.value, method
        self._tell()

    def tighten(self, bound: float) -> None:
        """No placement exceeds `bound` either."""
        self.bound = min(self.bound, bound)
        self._tell()

    def proven(self) -> bool:
        """Whether the best is as good as any placement can be."""
        return self.best >= self.bound * (1 - _PROVEN)

    def _tell(self) -> None:
        if self.best > self._reported[0] or self.bound < self._reported[1]:
            self._reported = (self.best, self.bound)
            self._report(self.best, self.bound, self._method)
