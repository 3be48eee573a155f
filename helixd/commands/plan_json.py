"""A report as one JSON object. A plan file too: `--current` and other tools read its `placement`."""

import json
import math

from helixd.commands.plan_report import NodeRow, PlanRow, Report
from helixd.plan.plan import Plan
from helixd.plan.predict import Prediction


def plan_json(found: Report) -> str:
    """The object as text, one line per key of its top level."""
    plan = found.plan
    return _pretty(
        {
            "format": "helixd-plan/1",
            "cluster": found.spec.name,
            "model": found.spec.model.name,
            "num_layers": plan.num_layers,
            "objective": found.objective,
            "seed": found.seed,
            "placement": {node: list(held.to_pair()) for node, held in plan.placement.items()},
            **_figures(plan),
            "gap": found.gap,
            "stages": found.stages,
            "survives_one_node": found.survives,
            "prediction": _prediction(found.prediction),
            "estimated": any(row.estimated for row in found.rows if row.held),
            "schedule": {
                node: [[hop.node, hop.flow_tokens_per_s] for hop in hops] for node, hops in plan.schedule.items()
            },
            "nodes": {row.id: _node(row) for row in found.rows},
            "load_bytes": found.load_bytes,
            "load_s": found.moving.load_s if found.moving else None,
            "ways_on": [
                {
                    "max_flow_tokens_per_s": option.flow_tokens_per_s,
                    "worth_tokens_per_s": option.worth,
                    "worth_while_loading_tokens_per_s": option.worth_while_loading,
                    "load_bytes": option.load_bytes,
                    "load_s": option.load_s,
                    "placement": {node: list(held.to_pair()) for node, held in option.placement.items()},
                }
                for option in found.moving.options
            ]
            if found.moving
            else None,
            "as_it_is": _figures(found.in_force) if found.in_force else None,
            "alone": {"node": found.alone[0], **_prediction_facts(found.alone[1])} if found.alone else None,
            "without_survival": _figures(found.unconstrained) if found.unconstrained else None,
            "compared": {row.name: _row(row) for row in found.compared} or None,
            "frontier": [
                {
                    "stages": point.stages,
                    "max_flow_tokens_per_s": point.max_flow_tokens_per_s,
                    "nodes": point.nodes,
                    "survives_one_node": point.survives,
                    "predicted_decode_tokens_per_s": point.predicted_decode_tokens_per_s,
                    "one_request_tokens_per_s": 1 / point.unloaded_round_s if point.unloaded_round_s else None,
                }
                for point in found.frontier
            ]
            or None,
            "cut_off": found.cut_off,
        }
    )


def _figures(plan: Plan) -> dict[str, object]:
    return {
        "max_flow_tokens_per_s": plan.max_flow_tokens_per_s,
        "upper_bound_tokens_per_s": plan.upper_bound_tokens_per_s,
        "predicted_decode_tokens_per_s": plan.predicted_decode_tokens_per_s,
        "method": plan.method,
        "simulated_plans": plan.simulated_plans,
        "solve_s": plan.solve_s,
    }


def _prediction(found: Prediction | None) -> dict[str, object] | None:
    return _prediction_facts(found) if found is not None else None


def _prediction_facts(found: Prediction) -> dict[str, object]:
    return {
        "decode_tokens_per_s": found.decode_tokens_per_s,
        "requests_in_flight": found.in_flight,
        "seconds_per_token": found.round_s if math.isfinite(found.round_s) else None,
        "one_request_tokens_per_s": _rate(found),
    }


def _rate(found: Prediction) -> float | None:
    return 1 / found.unloaded_round_s if 0 < found.unloaded_round_s < math.inf else None


def _node(row: NodeRow) -> dict[str, object]:
    return {
        "type": row.type,
        "estimated": row.estimated,
        "layers": list(row.held.to_pair()) if row.held else None,
        "throughput_tokens_per_s": row.throughput_tokens_per_s,
        "kv_tokens": row.kv_tokens,
        "weight_bytes": row.weight_bytes,
        "flow_tokens_per_s": row.flow_tokens_per_s,
        "share": row.share,
        "busy": row.busy,
        "links": {hop.node: {"flow_tokens_per_s": hop.flow_tokens_per_s, "full": hop.full} for hop in row.next_hops},
        "load_bytes": row.load_bytes,
        "note": row.note or None,
    }


def _row(row: PlanRow) -> dict[str, object]:
    if row.plan is None:
        return {"reason": row.reason}
    placement = {node: list(held.to_pair()) for node, held in row.plan.placement.items()}
    return _figures(row.plan) | {"stages": row.stages, "placement": placement}


def _pretty(data: dict[str, object]) -> str:
    lines = [f"  {json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in data.items()]
    return "{\n" + ",\n".join(lines) + "\n}"
