"""ClusterSpec -> Plan: make candidate placements, judge each by its true max flow and by the objective, keep the best.

Pure and deterministic for a seed; the clock, if any, comes in as an argument and can only end the search early.
Constraints of the nodes (pins, memory) hold in every plan returned.
"""

from collections.abc import Callable

from helixd.plan.cluster.spec import COORDINATOR, ClusterSpec
from helixd.plan.explain import explanations
from helixd.plan.graph.flow import FlowModel
from helixd.plan.graph.schedule import schedule_of
from helixd.plan.holding import Holding
from helixd.plan.plan import Infeasible, Plan, Progress
from helixd.plan.predict import stages
from helixd.plan.search.methods import SMALL, Candidate, Search

OBJECTIVES = ("throughput", "max-flow", "latency")

# Of two plans this close the one with the faster token for a lone request is taken: fewer stages, nearer ones. A
# prediction is off by some 12 % from what is simulated, and deep plans are the ones that fall short of theirs.
_SAME = 0.13
# What is given up, unasked, for keeping a pipeline when any one node is lost: a share of the best predicted throughput;
# in a small cluster, where the loss of a node is the end of service, a larger share of throughput or of flow.
_SURVIVAL_PRICE, _SURVIVAL_PRICE_SMALL = 0.1, 0.35


def plan_cluster(
    spec: ClusterSpec,
    *,
    seed: int = 0,
    time_limit_s: float = 10.0,
    objective: str = "throughput",
    survive: int | None = None,
    clock: Callable[[], float] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Plan:
    """The best plan found for `objective`: "throughput" (predicted serving), "max-flow" (the paper's) or "latency".

    `survive`: 1 asks for a complete pipeline after the loss of any one node, 0 does not care, None prefers such a plan
    where it costs little. `clock`: monotonic seconds; without it the search ends by its own budgets alone.
    `on_progress` is told of every better flow and every sharper bound, from within the search.

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
    best = _choose(candidates, objective, survive, len(spec.nodes) <= SMALL)
    if best is None:
        raise Infeasible(_why_not_safe(holding))
    decode = best.prediction.decode_tokens_per_s if best.prediction else None
    return Plan(
        num_layers=holding.num_layers,
        placement=best.placement,
        schedule=schedule_of(best.flow),
        max_flow_tokens_per_s=best.flow.value,
        upper_bound_tokens_per_s=search.bound,
        predicted_decode_tokens_per_s=decode,
        kv_capacity_token_layers=holding.kv_capacity(best.placement),
        explanations=explanations(holding, best.placement, best.flow),
        method=best.method,
        solve_s=clock() - started if clock else 0.0,
    )


def _choose(candidates: list[Candidate], objective: str, survive: int | None, small: bool) -> Candidate | None:
    """The best candidate; among nearly equal ones that with the fastest round, then fewer stages, then the earlier."""
    if survive:
        candidates = [found for found in candidates if found.survives]
        if not candidates:
            return None
    if objective == "max-flow":
        top = max(found.flow.value for found in candidates)
        return min((f for f in candidates if f.flow.value >= top * (1 - 1e-9)), key=lambda f: stages(f.flow))
    if objective == "latency":
        top = max(found.flow.value for found in candidates)
        return min((f for f in candidates if f.flow.value >= top / 2), key=_round_s)
    top = max(_worth(found) for found in candidates)
    if survive is None:
        safe = [found for found in candidates if found.survives and _affordable(found, candidates, top, small)]
        if safe:
            candidates, top = safe, max(_worth(found) for found in safe)
    near = [found for found in candidates if _worth(found) >= top * (1 - _SAME)]
    return min(near, key=lambda found: (round(_round_s(found), 6), round(stages(found.flow), 6), -_worth(found)))


def _affordable(safe: Candidate, candidates: list[Candidate], top: float, small: bool) -> bool:
    if not small:
        return _worth(safe) >= top * (1 - _SURVIVAL_PRICE)
    most = max(found.flow.value for found in candidates)
    left = 1 - _SURVIVAL_PRICE_SMALL
    return _worth(safe) >= top * left or safe.flow.value >= most * left


def _worth(found: Candidate) -> float:
    """Predicted decode tokens/s; where layer times are unknown, flow at a small price per stage."""
    if found.prediction is not None:
        return found.prediction.decode_tokens_per_s
    return found.flow.value * float(0.97 ** stages(found.flow))


def _round_s(found: Candidate) -> float:
    return found.prediction.unloaded_round_s if found.prediction is not None else stages(found.flow)


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
