"""Whether a new plan is worth more than what is in force. Knows nothing of what it costs to move layers there."""

from dataclasses import dataclass

from helixd.ids import NodeId
from helixd.plan.plan import Plan


@dataclass(frozen=True, slots=True)
class Gain:
    """The share by which `what` rises ("output" where both plans have a prediction, else "flow")."""

    share: float
    what: str

    def __str__(self) -> str:
        return f"{self.share:.0%} more {self.what}"


def gain(kept: Plan, planned: Plan) -> Gain:
    """What `planned` serves more than `kept`, both judged on the cluster as it is now; `kept` carries something."""
    before, after, what = kept.predicted_decode_tokens_per_s, planned.predicted_decode_tokens_per_s, "output"
    if not before or after is None:
        before, after, what = kept.max_flow_tokens_per_s, planned.max_flow_tokens_per_s, "flow"
    return Gain(after / before - 1, what)


def rerouted(before: Plan, after: Plan) -> float:
    """The largest share of what passes a vertex that goes on elsewhere than `before`; for plans with one placement."""
    return max(
        (
            abs(old.get(hop, 0.0) - new.get(hop, 0.0))
            for vertex in {*before.schedule, *after.schedule}
            for old, new in [(_shares(before, vertex), _shares(after, vertex))]
            for hop in {*old, *new}
        ),
        default=0.0,
    )


def _shares(plan: Plan, vertex: NodeId) -> dict[NodeId, float]:
    hops = plan.schedule.get(vertex, ())
    total = sum(hop.flow_tokens_per_s for hop in hops)
    return {hop.node: hop.flow_tokens_per_s / total for hop in hops} if total > 0 else {}
