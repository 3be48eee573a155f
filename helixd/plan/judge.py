"""From a placement, whoever made it, to a Plan: its true max flow, prediction, schedules and explanations."""

from collections.abc import Mapping

from helixd.ids import NodeId
from helixd.layers import LayerRange
from helixd.plan.explain import explanations
from helixd.plan.graph.flow import Flow, FlowModel
from helixd.plan.graph.schedule import schedule_of
from helixd.plan.holding import Holding
from helixd.plan.plan import Infeasible, Plan
from helixd.plan.predict import Prediction, predict


def judged(
    holding: Holding,
    placement: Mapping[NodeId, LayerRange],
    *,
    method: str,
    flow: Flow | None = None,
    prediction: Prediction | None = None,
    bound: float | None = None,
    solve_s: float = 0.0,
    check: bool = True,
) -> Plan:
    """The plan that `placement` makes. `flow` and `prediction` where they are already known.

    Raises Infeasible if nothing flows, or (`check`) if a node may not hold its range.
    """
    for node, held in placement.items():
        if check and not holding.allows(node, held):
            raise Infeasible(f"node {node} may not hold {held}: its memory or its pins do not allow it")
    if flow is None:
        flow = FlowModel(holding.spec).solve(placement)
    if flow.value <= 0:
        raise Infeasible("no pipeline through all layers: links or layers are missing")
    prediction = prediction or predict(holding, placement, flow)
    return Plan(
        num_layers=holding.num_layers,
        placement=placement,
        schedule=schedule_of(flow),
        max_flow_tokens_per_s=flow.value,
        upper_bound_tokens_per_s=bound,
        predicted_decode_tokens_per_s=prediction.decode_tokens_per_s if prediction else None,
        kv_capacity_token_layers=holding.kv_capacity(placement),
        explanations=explanations(holding, placement, flow),
        method=method,
        solve_s=solve_s,
    )


def current_plan(holding: Holding) -> Plan | None:
    """What the nodes hold now, as far as they may, as a plan of the cluster now; None if no pipeline is left of it."""
    placement = {node.id: node.current_range for node in holding.spec.nodes if node.current_range is not None}
    return in_force(holding, {node: held for node, held in placement.items() if holding.allows(node, held)})


def in_force(holding: Holding, placement: Mapping[NodeId, LayerRange]) -> Plan | None:
    """A placement made for the cluster as it was, judged on the cluster as it is; None if no pipeline is left of it.

    Pins and memory limits are not held against it: it is there.
    """
    known = {node.id: node for node in holding.spec.nodes}
    left = {
        node: held
        for node, held in placement.items()
        if node in known and len(held) <= len(known[node].profile.throughput_tokens_per_s)
    }
    try:
        return judged(holding, left, method="in force", check=False)
    except Infeasible:
        return None
