"""ClusterSpec -> Plan: make candidate placements, judge each by its true max flow and by the objective, keep the best.

Pure and deterministic for a seed; the clock, if any, comes in as an argument and can only end the search early.
Constraints of the nodes (pins, memory) hold in every plan returned.
"""

from collections.abc import Callable
from dataclasses import replace

from helixd.plan.choice import choose, choose_by_trial
from helixd.plan.cluster.spec import COORDINATOR, ClusterSpec
from helixd.plan.explain import explanations
from helixd.plan.graph.flow import FlowModel
from helixd.plan.graph.schedule import schedule_of
from helixd.plan.holding import Holding
from helixd.plan.plan import Infeasible, Plan, Progress
from helixd.plan.predict import Prediction
from helixd.plan.search.methods import SMALL, Candidate, Search

OBJECTIVES = ("throughput", "max-flow", "latency")

Trial = Callable[[Plan, Prediction], float | None]
"""Decode tokens/s that a plan serves when it is run, given what is predicted of it. None: there is no time for it."""


def plan_cluster(
    spec: ClusterSpec,
    *,
    seed: int = 0,
    time_limit_s: float = 10.0,
    objective: str = "throughput",
    survive: int | None = None,
    clock: Callable[[], float] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    trial: Trial | None = None,
) -> Plan:
    """The best plan found for `objective`: "throughput" (predicted serving), "max-flow" (the paper's) or "latency".

    `survive`: 1 asks for a complete pipeline after the loss of any one node, 0 does not care, None prefers such a plan
    where it costs little. `clock`: monotonic seconds; without it the search ends by its own budgets alone.
    `on_progress` is told of every better flow and every sharper bound, from within the search. `trial`: for the
    objective "throughput", the plans predicted best are run too, and the one that serves most is taken.

    Raises Infeasible if no placement serves the model, ValueError for an unknown objective.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"objective {objective!r} is none of {', '.join(OBJECTIVES)}")
    started = clock() if clock else 0.0
    holding = Holding(spec)
    holding.check_memory()

    def report(flow: float, bound: float, method: str) -> None:
        if on_progress is not None:
            on_progress(Progress(clock() - started if clock else 0.0, flow, bound, method))

    search = Search(
        holding,
        seed=seed,
        effort_s=time_limit_s,
        out_of_time=lambda: bool(clock and clock() - started > time_limit_s),
        frontier=objective != "max-flow",
        widths=(1,) if survive == 0 or (objective == "max-flow" and survive is None) else (1, 2),
        report=report,
    )
    candidates = search.run()
    if not candidates:
        raise Infeasible(_why_none(holding))
    small = len(spec.nodes) <= SMALL
    best, tried = choose(candidates, objective, survive, small), 0
    if best is None:
        raise Infeasible(_why_not_safe(holding))

    def plan_of(found: Candidate) -> Plan:
        return Plan(
            num_layers=holding.num_layers,
            placement=found.placement,
            schedule=schedule_of(found.flow),
            max_flow_tokens_per_s=found.flow.value,
            upper_bound_tokens_per_s=search.bound,
            predicted_decode_tokens_per_s=found.prediction.decode_tokens_per_s if found.prediction else None,
            kv_capacity_token_layers=holding.kv_capacity(found.placement),
            method=found.method,
        )

    def run(found: Candidate) -> float | None:
        return trial(plan_of(found), found.prediction) if trial and found.prediction else None

    if trial is not None and objective == "throughput":
        best, tried = choose_by_trial(candidates, survive, small, run) or (best, 0)
    return replace(
        plan_of(best),
        simulated_plans=tried,
        explanations=explanations(holding, best.placement, best.flow),
        solve_s=clock() - started if clock else 0.0,
    )


def _why_not_safe(holding: Holding) -> str:
    room = sum(holding.max_layers(node.id) for node in holding.usable())
    said = "no placement found keeps a complete pipeline when any one node is lost"
    if room < 2 * holding.num_layers:
        said += f" (each of {holding.num_layers} layers must be held twice, nodes hold {room})"
    return said + ": add nodes or memory, or plan with survive 0"


def _why_none(holding: Holding) -> str:
    spec = holding.spec
    flows = FlowModel(spec)
    nodes = [node.id for node in holding.usable()]
    if not any(flows.link_capacity(COORDINATOR, node) > 0 for node in nodes):
        return "no usable node can be reached from the coordinator: check addresses and firewalls"
    if not any(flows.link_capacity(node, COORDINATOR) > 0 for node in nodes):
        return "no usable node can reach the coordinator: check addresses and firewalls"
    return (
        f"the {len(nodes)} usable nodes have memory for the model, but no chain of them over links that exist holds "
        f"all {spec.model.num_layers} layers under the pins given: check links between nodes, pins and exclusions"
    )
