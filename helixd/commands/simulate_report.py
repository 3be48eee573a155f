"""What a simulated run showed, as one object for text, picture and JSON."""

import json
from dataclasses import dataclass, field

from helixd.plan.cluster.spec import ClusterSpec
from helixd.plan.plan import Plan
from helixd.sim.load import Load, Offline, Online
from helixd.sim.meter import Quantiles, Report


@dataclass(frozen=True, slots=True)
class Simulated:
    """One plan under a load. `name` is what the command line calls it.

    `impossible`: what it was to be compared with and no plan exists for, and why.
    """

    name: str
    spec: ClusterSpec
    plan: Plan
    load: Load
    report: Report
    impossible: dict[str, str] = field(default_factory=dict)


def simulate_json(found: list[Simulated]) -> str:
    """One JSON object: the first plan's figures, then those of the others under `compared`."""
    first, *others = found
    whole = _figures(first)
    whole["nodes"] = {
        node: {
            "layers": list(first.plan.placement[node].to_pair()),
            "busy": seen.busy,
            "busy_with_prompts": seen.prompt,
            "batches": seen.batches,
            "decodes_per_batch": seen.mean_decodes,
            "kv_mean": seen.kv_mean,
            "kv_peak": seen.kv_peak,
        }
        for node, seen in first.report.nodes.items()
    }
    compared: dict[str, object] = {other.name: _figures(other) for other in others}
    compared |= {name: {"plan": name, "no_plan": why} for name, why in first.impossible.items()}
    whole["compared"] = compared or None
    return "{\n" + ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in whole.items()) + "\n}"


def _figures(found: Simulated) -> dict[str, object]:
    report, load = found.report, found.load
    return {
        "cluster": found.spec.name,
        "plan": found.name,
        "policy": report.policy,
        "load": "offline" if isinstance(load, Offline) else "online" if isinstance(load, Online) else "trace",
        "offered_tokens_per_s": load.tokens_per_s if isinstance(load, Online) else None,
        "measured_s": report.window_s,
        "decode_tokens_per_s": report.decode_tokens_per_s,
        "total_tokens_per_s": report.total_tokens_per_s,
        "ttft_s": _quantiles(report.ttft_s),
        "tpot_s": _quantiles(report.tpot_s),
        "request_tpot_s": _quantiles(report.request_tpot_s),
        "e2e_s": _quantiles(report.e2e_s),
        "max_flow_tokens_per_s": found.plan.max_flow_tokens_per_s,
        "predicted_decode_tokens_per_s": found.plan.predicted_decode_tokens_per_s,
        "started": report.started,
        "finished": report.finished,
        "dropped": report.dropped,
        "preempted": report.preempted,
        "recovered": report.recovered,
        "mean_in_flight": report.mean_in_flight,
        "mean_waiting": report.mean_waiting,
        "decode_pass_s": dict(report.round_s),
    }


def _quantiles(seen: Quantiles) -> dict[str, float] | None:
    if not seen.count:
        return None
    return {"p50": seen.p50, "p95": seen.p95, "p99": seen.p99, "mean": seen.mean}
