"""Whether a new plan is worth more than what is in force. Knows nothing of what it costs to move layers there."""

from dataclasses import dataclass

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
