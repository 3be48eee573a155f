"""How much flow costs in depth: of all plans a search meets, those that no other beats in both flow and stages.

A token crosses every stage one after another, so depth is latency; flow is what the cluster carries at most.
"""

from collections.abc import Callable
from dataclasses import dataclass

from helixd.plan.cluster.spec import ClusterSpec
from helixd.plan.holding import Holding
from helixd.plan.predict import stages
from helixd.plan.search.methods import Candidate, Search

# Plans closer than this in flow are one point: the shallower.
_SAME_FLOW = 0.005


@dataclass(frozen=True, slots=True)
class FrontierPoint:
    """One plan. `stages`: nodes a token crosses, weighted by flow; `round_s`: a decode step of a lone sequence."""

    stages: float
    max_flow_tokens_per_s: float
    nodes: int
    survives: bool
    predicted_decode_tokens_per_s: float | None
    unloaded_round_s: float | None


def frontier(
    spec: ClusterSpec,
    *,
    seed: int = 0,
    time_limit_s: float = 10.0,
    clock: Callable[[], float] | None = None,
) -> tuple[FrontierPoint, ...]:
    """The points, shallowest first; empty if nothing serves. Raises Infeasible if the memory cannot hold the model."""
    started = clock() if clock else 0.0
    holding = Holding(spec)
    holding.check_memory()
    search = Search(
        holding,
        seed=seed,
        effort_s=time_limit_s,
        out_of_time=lambda: bool(clock and clock() - started > time_limit_s),
        frontier=True,
        widths=(1, 2),
    )
    return undominated(search.run())


def undominated(candidates: list[Candidate]) -> tuple[FrontierPoint, ...]:
    """The candidates that no other beats in flow and stages, shallowest first."""
    kept: list[FrontierPoint] = []
    most = 0.0
    for found in sorted(candidates, key=lambda found: (round(stages(found.flow), 6), -found.flow.value)):
        if found.flow.value > most * (1 + _SAME_FLOW):
            most = found.flow.value
            kept.append(_point(found))
    return tuple(kept)


def _point(found: Candidate) -> FrontierPoint:
    prediction = found.prediction
    return FrontierPoint(
        stages=stages(found.flow),
        max_flow_tokens_per_s=found.flow.value,
        nodes=len(found.flow.through),
        survives=found.survives,
        predicted_decode_tokens_per_s=prediction.decode_tokens_per_s if prediction else None,
        unloaded_round_s=prediction.unloaded_round_s if prediction else None,
    )
