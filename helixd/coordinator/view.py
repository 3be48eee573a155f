"""What the coordinator shows of itself: readiness with its reason, and the `/cluster` view. Read-only."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from helixd.coordinator.fleet import Node
from helixd.coordinator.generation import Readiness
from helixd.ids import NodeId
from helixd.protocol.messages import EpochState

if TYPE_CHECKING:
    from helixd.coordinator.coordinator import Coordinator


def readiness(c: Coordinator) -> Readiness:
    """Ready iff a complete pipeline is up and the daemon is not draining; else why not."""
    active, coming = c.epochs.active, c.epochs.coming
    detail: dict[str, object] = {
        "epoch": active.epoch if active is not None else None,
        "nodes": len(c.fleet.nodes),
        "waiting": c.admission.waiting,
        "running": c.admission.running,
    }
    if c.draining:
        return Readiness(False, "draining", "this daemon is draining and takes no new requests", detail)
    if c.admission.has_pipeline():
        return Readiness(True, None, "ready", detail)
    if coming is not None:
        loading = {
            node: f"{state.done}/{state.total} layers" + (f", {state.message}" if state.message else "")
            for node, state in coming.states.items()
            if state.state == "loading"
        }
        return Readiness(False, "model_loading", "workers are loading layers", {**detail, "loading": loading})
    missing = [] if active is None else sorted(n for n in active.plan.placement if n not in c.fleet.nodes)
    if c.replanner.infeasible and not missing:
        return Readiness(False, "no_feasible_placement", c.replanner.why_no_plan, detail)
    if active is not None:
        failed = {n: s.message for n, s in active.states.items() if s.state == "failed"}
        trouble = [f"missing: {', '.join(missing)}"] if missing else []
        trouble += [f"failed: {', '.join(sorted(failed))} (/cluster has the reasons)"] if failed else []
        trouble += [f"without them {c.replanner.why_no_plan}"] if missing and c.replanner.infeasible else []
        why = "no complete pipeline is up; " + ("; ".join(trouble) or "waiting for nodes to be ready")
        return Readiness(False, "pipeline_lost", why, {**detail, "missing": missing, "failed": failed})
    return Readiness(False, "model_loading", c.replanner.why_no_plan, detail)


def cluster_view(c: Coordinator) -> Mapping[str, object]:
    """Nodes, ranges, links, epoch, per-node load, and what each worker confirmed."""
    active = c.epochs.active
    ready = c.readiness()
    return {
        "coordinator": c.network.identity.peer,
        "incarnation": c.network.identity.incarnation,
        "model": {
            "name": c.model.name,
            "fingerprint": c.model.fingerprint,
            "layers": c.model.config.num_layers,
            "dtype": c.model.dtype,
            "max_context_tokens": c.max_context_tokens,
            "layer_bytes": c.sizes.layer_bytes,
            "embedding_bytes": c.sizes.embedding_bytes,
            "head_bytes": c.sizes.head_bytes,
        },
        "ready": {"ready": ready.ready, "code": ready.code, "message": ready.message},
        "epoch": active.epoch if active is not None else None,
        "coming_epoch": c.epochs.coming.epoch if c.epochs.coming is not None else None,
        "plan": _plan_view(c),
        "nodes": [_node_view(c, node) for node in sorted(c.fleet.nodes)],
        "links": [
            {
                "src": src,
                "dst": dst,
                "rtt_s": None if fact.error else fact.rtt_s,
                "bandwidth_bytes_per_s": None if fact.error else fact.bandwidth_bytes_per_s,
                "error": fact.error or None,
                "relayed": active is not None and frozenset((src, dst)) in active.relayed,
            }
            for (src, dst), fact in sorted(c.fleet.links.items())
        ],
        "requests": {
            "running": c.admission.running,
            "waiting": c.admission.waiting,
            "failovers": c.desk.failovers,
            "preemptions": c.admission.preemptions,
        },
        "drift": [
            {
                "subject": event.subject,
                "age_s": round(time.monotonic() - event.at_s, 1),
                "what": event.sentence,
                "decision": event.decision or None,
            }
            for event in reversed(c.drift.events)
        ],
        "relay": {
            "carried_frames": c.relay.carried_frames,
            "carried_bytes": c.relay.carried_bytes,
            "dropped_frames": c.relay.dropped_frames,
        },
    }


def _plan_view(c: Coordinator) -> Mapping[str, object] | None:
    active = c.epochs.active
    if active is None:
        return None
    plan = active.plan
    return {
        "placement": {node: layers.to_pair() for node, layers in plan.placement.items()},
        "schedule": {
            vertex: [{"to": hop.node, "tokens_per_s": hop.flow_tokens_per_s} for hop in hops]
            for vertex, hops in plan.schedule.items()
        },
        "max_flow_tokens_per_s": plan.max_flow_tokens_per_s,
        "upper_bound_tokens_per_s": plan.upper_bound_tokens_per_s,
        "predicted_decode_tokens_per_s": plan.predicted_decode_tokens_per_s,
        "explanations": dict(plan.explanations or {}),
        "relayed": sorted(map(sorted, active.relayed)),
        "method": plan.method,
        "solve_s": plan.solve_s,
    }


def _problem(node: Node, confirmed: EpochState | None) -> str | None:
    if node.hangs_after_steps is not None:
        return "its device hangs: it has work and does no step"
    return confirmed.message if confirmed is not None and confirmed.state == "failed" else None


def _node_view(c: Coordinator, node_id: NodeId) -> Mapping[str, object]:
    node = c.fleet.nodes[node_id]
    peer = c.fleet.peers[node.peer]
    active = c.epochs.active
    layers = active.plan.placement.get(node_id) if active is not None else None
    confirmed = active.states.get(node_id) if active is not None else None
    status, measured, ledger = node.status, node.measured, c.admission.ledger
    return {
        "id": node_id,
        "name": peer.hello.name,
        "peer": node.peer,
        "incarnation": peer.incarnation,
        "address": f"{peer.host}:{peer.port}",
        "software": peer.hello.software,
        "device": node.hardware.device,
        "device_name": node.hardware.device_name,
        "memory_budget_bytes": node.hardware.memory_budget_bytes,
        "draining": peer.draining,
        "rtt_s": peer.link.rtt_s,
        "layers": None if layers is None else layers.to_pair(),
        "confirmed": None if confirmed is None else {"epoch": confirmed.epoch, "state": confirmed.state},
        "note": c.replanner.notes.get(node_id),
        "problem": _problem(node, confirmed),
        "kv_reserved_token_layers": ledger.used(node_id),
        "slowdown": {
            "prefill": status.prefill_slowdown or None if status is not None else None,
            "decode": status.decode_slowdown or None if status is not None else None,
            "planned_with": {"prefill": node.slowdown.prefill, "decode": node.slowdown.decode},
            "off_for_s": c.drift.off_for_s(node, time.monotonic()),
        },
        "measured": None
        if measured is None
        else {
            "prompt_layer_time_s": measured.prompt_layer_time_s,
            "decode_layer_time_s": measured.decode_layer_time_s,
        },
        "load": None
        if status is None
        else {
            "steps_done": status.steps_done,
            "oldest_work_age_s": status.oldest_work_age_s,
            "queued_tokens": status.queued_tokens,
            "open_sequences": status.open_sequences,
            "kv_used_token_layers": status.kv_used_token_layers,
            "kv_capacity_token_layers": status.kv_capacity_token_layers,
            "kv_pages_used": status.kv_pages_used,
            "stale_frames": status.stale_frames,
            "loop_lag_s": status.loop_lag_s,
            "resident_bytes": status.resident_bytes,
            "weight_bytes_loaded": status.weight_bytes_loaded,
        },
    }
