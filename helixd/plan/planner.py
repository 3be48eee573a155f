"""ClusterSpec -> Plan: make candidate placements, judge each by its true max flow and by the objective, keep the best.

Pure and deterministic for a seed; the clock, if any, comes in as an argument and can only end the search early.
Constraints of the nodes (pins, memory) hold in every plan returned.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from helixd.ids import NodeId
from helixd.layers import LayerRange
from helixd.plan.chains import pipelines
from helixd.plan.cover import CoverSearch
from helixd.plan.exhaustive import best_of_all
from helixd.plan.explain import explanations
from helixd.plan.flow import Flow, FlowModel
from helixd.plan.holding import Holding
from helixd.plan.plan import Infeasible, Plan
from helixd.plan.predict import Prediction, predict, stages
from helixd.plan.repair import improve
from helixd.plan.schedule import schedule_of
from helixd.plan.spec import COORDINATOR, ClusterSpec
from helixd.plan.stages import best_cover, capacity_bound, cover, few_kinds, kinds_of, lay_out

OBJECTIVES = ("throughput", "max-flow", "latency")

# Flows, as shares of the best cover, at which the fewest stages are looked for.
_FRONTIER = (0.97, 0.94, 0.9, 0.85, 0.8, 0.72, 0.64, 0.56, 0.48, 0.4, 0.32, 0.25)
# Of two plans this close the one with fewer stages is taken.
_SAME = 0.03
# Clusters of up to so many nodes are searched more closely.
_SMALL = 8
# What is given up, unasked, for keeping a pipeline when any one node is lost: a share of the best predicted throughput;
# in a small cluster, where the loss of a node is the end of service, a larger share of throughput or of flow.
_SURVIVAL_PRICE, _SURVIVAL_PRICE_SMALL = 0.1, 0.35

Placement = dict[NodeId, LayerRange]


@dataclass(frozen=True, slots=True)
class _Candidate:
    placement: Placement
    flow: Flow
    prediction: Prediction | None
    survives: bool
    method: str


def plan_cluster(
    spec: ClusterSpec,
    *,
    seed: int = 0,
    time_limit_s: float = 10.0,
    objective: str = "throughput",
    survive: int | None = None,
    clock: Callable[[], float] | None = None,
) -> Plan:
    """The best plan found for `objective`: "throughput" (predicted serving), "max-flow" (the paper's) or "latency".

    `survive`: 1 asks for a complete pipeline after the loss of any one node, 0 does not care, None prefers such a plan
    where it costs little. `clock`: monotonic seconds; without it the search ends by its own budgets alone.

    Raises Infeasible if no placement serves the model, ValueError for an unknown objective.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"objective {objective!r} is none of {', '.join(OBJECTIVES)}")
    started = clock() if clock else 0.0
    holding = Holding(spec)
    holding.check_memory()
    search = _Search(holding, seed, lambda: bool(clock and clock() - started > time_limit_s), survive)
    candidates = list(search.candidates(objective))
    if not candidates:
        raise Infeasible(_why_none(holding))
    best = _choose(candidates, objective, survive, len(spec.nodes) <= _SMALL)
    if best is None:
        raise Infeasible(
            "no placement found keeps a complete pipeline when any one node is lost: "
            "add nodes or memory, or plan with survive 0"
        )
    bound = max(search.bound, max(found.flow.value for found in candidates))
    decode = best.prediction.decode_tokens_per_s if best.prediction else None
    return Plan(
        num_layers=holding.num_layers,
        placement=best.placement,
        schedule=schedule_of(best.flow),
        max_flow_tokens_per_s=best.flow.value,
        upper_bound_tokens_per_s=bound,
        predicted_decode_tokens_per_s=decode,
        kv_capacity_token_layers=holding.kv_capacity(best.placement),
        explanations=explanations(holding, best.placement, best.flow),
        method=best.method,
        solve_s=clock() - started if clock else 0.0,
    )


class _Search:
    """Makes candidates; each placement is judged once."""

    def __init__(self, holding: Holding, seed: int, out_of_time: Callable[[], bool], survive: int | None) -> None:
        self._holding = holding
        self._flows = FlowModel(holding.spec)
        self._seed = seed
        self._out_of_time = out_of_time
        self._survive = survive
        self._seen: set[tuple[tuple[NodeId, LayerRange], ...]] = set()
        self.bound = capacity_bound(holding)

    def candidates(self, objective: str) -> Iterator[_Candidate]:
        """Placements worth judging, valid ones with flow only."""
        best_flow = 0.0
        for placement, method, goal in self._sources(objective):
            if not placement:
                continue
            small = len(self._holding.spec.nodes) <= _SMALL
            if goal > 0 and self._flows.value(placement) < goal * (1 - 1e-6):
                placement, _ = improve(
                    self._holding, self._flows, placement, evaluations=1500 if small else 6000, goal=goal,
                    seed=self._seed, out_of_time=self._out_of_time,
                )  # fmt: skip
            found = self._judge(placement, method)
            if found is not None:
                best_flow = max(best_flow, found.flow.value)
                yield found
            if self._out_of_time() and best_flow > 0:
                return

    def _judge(self, placement: Placement, method: str) -> _Candidate | None:
        placement = dict(sorted(placement.items()))
        key = tuple(placement.items())
        if key in self._seen or not self._valid(placement):
            return None
        self._seen.add(key)
        flow = self._flows.solve(placement)
        if flow.value <= 0:
            return None
        survives = all(
            self._flows.value({n: held for n, held in placement.items() if n != lost}) > 0 for lost in flow.through
        )
        return _Candidate(placement, flow, predict(self._holding, placement, flow), survives, method)

    def _valid(self, placement: Placement) -> bool:
        spec = self._holding.spec
        return all(self._holding.allows(node, held) for node, held in placement.items()) and all(
            node.id in placement for node in spec.nodes if self._holding.must_hold(node.id)
        )

    def _sources(self, objective: str) -> Iterator[tuple[Placement, str, float]]:
        """Placements, the method's name, and the flow they should have where links do not bind (0: leave as it is)."""
        holding = self._holding
        pinned = any(holding.must_hold(node.id) for node in holding.spec.nodes)
        small = len(holding.spec.nodes) <= _SMALL
        exact = best_of_all(holding, self._flows)
        if exact is not None:
            placement, proven = exact
            if proven:
                self.bound = min(self.bound, self._flows.value(placement))
            yield placement, "exhaustive", 0.0
        if not pinned:
            for width in (1, 2) if self._survive != 0 else (1,):
                yield from self._stage_sources(width, objective)
        if small or pinned or exact is None:
            cover_search = CoverSearch(holding, seed=self._seed)
            for share in (1.0, 0.8, 0.6, 0.4) if small or pinned else (1.0,):
                placement = cover_search.run(self.bound * share, sweeps=60 if small else 30)
                yield placement, "cover search", self.bound if small else 0.0
        chains = pipelines(holding, self._flows, seed=self._seed)
        if chains:
            yield self._with_pins(chains), "pipelines", self.bound if small else 0.0

    def _stage_sources(self, width: int, objective: str) -> Iterator[tuple[Placement, str, float]]:
        every, num_layers = kinds_of(self._holding), self._holding.num_layers
        kinds = few_kinds(every)
        found = best_cover(
            kinds, num_layers, self.bound, min_width=width, seed=self._seed, out_of_time=self._out_of_time
        )
        if found is None:
            return
        flow, chosen = found
        yield lay_out(chosen, kinds, num_layers), "stages", flow
        if len(kinds) < len(every):
            start = lay_out(chosen, kinds, num_layers)
            found_cover = CoverSearch(self._holding, seed=self._seed).run(flow, sweeps=30, start=start)
            yield found_cover, "stages, cover search", 0.0
        for share in (1 - 1e-6, *(() if objective == "max-flow" else _FRONTIER)):
            fewest = cover(kinds, num_layers, flow * share, min_width=width, fewest=True, seed=self._seed)
            if fewest is not None:
                yield lay_out(fewest, kinds, num_layers), "fewest stages", flow * share

    def _with_pins(self, placement: Placement) -> Placement:
        pinned = {
            node.id: node.fixed_range if node.fixed_range is not None else self._holding.options(node.id)[0]
            for node in self._holding.spec.nodes
            if self._holding.must_hold(node.id)
            and (node.id not in placement or not self._holding.allows(node.id, placement[node.id]))
        }
        return placement | pinned


def _choose(candidates: list[_Candidate], objective: str, survive: int | None, small: bool) -> _Candidate | None:
    """The best candidate; among nearly equal ones the one with fewer stages, then the earlier."""
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
    return min(near, key=lambda found: (round(stages(found.flow), 6), -_worth(found)))


def _affordable(safe: _Candidate, candidates: list[_Candidate], top: float, small: bool) -> bool:
    if not small:
        return _worth(safe) >= top * (1 - _SURVIVAL_PRICE)
    most = max(found.flow.value for found in candidates)
    left = 1 - _SURVIVAL_PRICE_SMALL
    return _worth(safe) >= top * left or safe.flow.value >= most * left


def _worth(found: _Candidate) -> float:
    """Predicted decode tokens/s; where layer times are unknown, flow at a small price per stage."""
    if found.prediction is not None:
        return found.prediction.decode_tokens_per_s
    return found.flow.value * float(0.97 ** stages(found.flow))


def _round_s(found: _Candidate) -> float:
    return found.prediction.unloaded_round_s if found.prediction is not None else stages(found.flow)


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
