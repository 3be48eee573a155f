"""The simulated twin of a rehearsal: the plan that the coordinator serves by, the load that it is sent.

The simulator goes by the options that the daemons were started with, and by what is different in a rehearsal: clients
announce how much they want.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from helixd.coordinator.admission import KV_PAGE_TOKENS
from helixd.ids import NodeId
from helixd.layers import LayerRange
from helixd.plan.cluster.spec import ClusterSpec
from helixd.plan.plan import Hop, Plan
from helixd.sim.helixd import HelixdPolicy
from helixd.sim.load import Lengths, Load, Offline
from helixd.sim.meter import Report
from helixd.sim.stage_node import StepLimits

ROOM_FOR_CLIENTS = 1.1
"""So many more clients than sequences that fit: there is always somebody in line."""


def served_plan(view: Mapping[str, Any], num_layers: int, time_scale: float) -> Plan:
    """The plan of `/cluster`, in the cluster's own seconds."""
    plan = view["plan"]
    room = {
        NodeId(node["id"]): node["load"]["kv_capacity_token_layers"]
        for node in view["nodes"]
        if node["load"] is not None and node["id"] in plan["placement"]
    }
    return Plan(
        num_layers,
        {NodeId(node): LayerRange(*pair) for node, pair in plan["placement"].items()},
        {
            NodeId(vertex): tuple(Hop(NodeId(hop["to"]), hop["tokens_per_s"] * time_scale) for hop in hops)
            for vertex, hops in plan["schedule"].items()
        },
        plan["max_flow_tokens_per_s"] * time_scale,
        kv_capacity_token_layers=room,
        method=plan["method"],
    )


def policy(limits: StepLimits) -> HelixdPolicy:
    """What the daemons do with these limits of a step."""
    return HelixdPolicy(limits=limits, kv_page_tokens=KV_PAGE_TOKENS, lengths_announced=True)


def clients_for(
    spec: ClusterSpec, plan: Plan, limits: StepLimits, lengths: Lengths, load: Offline, seed: int
) -> Offline:
    """The load with as many clients as keep the cluster full, if it does not say how many."""
    if load.in_flight is not None:
        return load
    report = policy(limits).run(spec, plan, load, lengths, seed=seed)
    return replace(load, in_flight=max(1, round(ROOM_FOR_CLIENTS * report.mean_in_flight)))


def simulated(spec: ClusterSpec, plan: Plan, limits: StepLimits, lengths: Lengths, load: Load, seed: int) -> Report:
    """The same run, simulated."""
    return policy(limits).run(spec, plan, load, lengths, seed=seed)
