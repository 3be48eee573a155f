"""What there is to say about a plan, as numbers and short texts; how it is shown is others' business."""

from dataclasses import dataclass

from helixd.ids import NodeId
from helixd.layers import LayerRange
from helixd.plan.cluster.spec import COORDINATOR, ClusterSpec, NodeSpec
from helixd.plan.graph.flow import Flow, FlowModel, node_capacity
from helixd.plan.graph.survival import survives_one_loss
from helixd.plan.holding import Holding
from helixd.plan.plan import Plan
from helixd.plan.predict import Prediction, predict, stages
from helixd.plan.undominated import FrontierPoint
from helixd.solver.job import Moving
from helixd.solver.process import Outcome


@dataclass(frozen=True, slots=True)
class NextHop:
    """A link in use. `full`: the flow's share of what the link carries."""

    node: NodeId
    flow_tokens_per_s: float
    full: float


@dataclass(frozen=True, slots=True)
class NodeRow:
    """One node. Fields about what it holds are None while it holds nothing.

    `kv_tokens`: tokens whose KV fits in every layer held. `share`: of the plan's flow, what passes here; `busy`: of
    what the node could carry. `load_bytes`: weights that it does not hold yet (where it is known what it holds).
    """

    id: NodeId
    type: str
    estimated: bool
    held: LayerRange | None
    throughput_tokens_per_s: float | None
    kv_tokens: float | None
    weight_bytes: float | None
    flow_tokens_per_s: float
    share: float
    busy: float
    next_hops: tuple[NextHop, ...]
    load_bytes: float | None
    note: str


@dataclass(frozen=True, slots=True)
class PlanRow:
    """A plan in one line, to compare with others. `plan` is None where the rule has none, for `reason`."""

    name: str
    plan: Plan | None
    stages: float | None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """Everything about one run of the planner. `alone`: what the best single node would serve, where one can."""

    spec: ClusterSpec
    objective: str
    seed: int
    plan: Plan
    stages: float
    survives: bool
    prediction: Prediction | None
    alone: tuple[NodeId, Prediction] | None
    rows: tuple[NodeRow, ...]
    compared: tuple[PlanRow, ...]
    in_force: Plan | None
    moving: Moving | None
    unconstrained: Plan | None
    frontier: tuple[FrontierPoint, ...]
    cut_off: str | None

    @property
    def gap(self) -> float | None:
        """The share of the bound that the plan's flow does not reach."""
        bound = self.plan.upper_bound_tokens_per_s
        return max(0.0, 1 - self.plan.max_flow_tokens_per_s / bound) if bound else None

    @property
    def weight_bytes(self) -> float:
        """Of the whole model, once."""
        model = self.spec.model
        return model.num_layers * model.layer_bytes + model.embedding_bytes + model.head_bytes

    @property
    def load_bytes(self) -> float | None:
        """Weights that must be loaded for the plan; None if it is not known what nodes hold."""
        loads = [row.load_bytes for row in self.rows if row.load_bytes is not None]
        return sum(loads) if loads else None


def report(spec: ClusterSpec, outcome: Outcome, *, objective: str, seed: int) -> Report:
    """The report on an outcome that has a plan."""
    assert outcome.plan is not None
    plan = outcome.plan
    holding = Holding(spec)
    flows = FlowModel(spec)
    flow = _flow(plan)
    knows_current = any(node.current_range is not None for node in spec.nodes)
    return Report(
        spec=spec,
        objective=objective,
        seed=seed,
        plan=plan,
        stages=stages(flow),
        survives=survives_one_loss(flows, plan.placement),
        prediction=predict(holding, plan.placement, flow),
        alone=_alone(holding, flows),
        rows=tuple(_row(holding, flows, plan, node, knows_current) for node in spec.nodes),
        compared=_compared(plan, outcome),
        in_force=outcome.in_force,
        moving=outcome.moving,
        unconstrained=outcome.unconstrained,
        frontier=outcome.depths,
        cut_off=outcome.cut_off,
    )


def _flow(plan: Plan) -> Flow:
    """The flow that the plan's schedules are, without its cut."""
    edges = {(src, hop.node): hop.flow_tokens_per_s for src, hops in plan.schedule.items() for hop in hops}
    through = {
        src: sum(hop.flow_tokens_per_s for hop in hops) for src, hops in plan.schedule.items() if src != COORDINATOR
    }
    return Flow(plan.max_flow_tokens_per_s, edges, through, frozenset(), frozenset())


def _row(holding: Holding, flows: FlowModel, plan: Plan, node: NodeSpec, knows_current: bool) -> NodeRow:
    held = plan.placement.get(node.id)
    hops = plan.schedule.get(node.id, ())
    through = sum(hop.flow_tokens_per_s for hop in hops)
    rate = node_capacity(holding.spec, node, len(held)) if held else None
    return NodeRow(
        id=node.id,
        type=node.profile.type,
        estimated=node.profile.estimated,
        held=held,
        throughput_tokens_per_s=rate,
        kv_tokens=holding.kv_token_layers(node.id, held) / len(held) if held else None,
        weight_bytes=_bytes(holding.spec, held, None) if held else None,
        flow_tokens_per_s=through,
        share=through / plan.max_flow_tokens_per_s if plan.max_flow_tokens_per_s > 0 else 0.0,
        busy=through / rate if rate else 0.0,
        next_hops=tuple(
            NextHop(hop.node, flow, flow / max(1e-9, flows.link_capacity(node.id, hop.node)))
            for hop in hops
            if (flow := hop.flow_tokens_per_s) > 0
        ),
        load_bytes=_bytes(holding.spec, held, node.current_range) if knows_current else None,
        note=(plan.explanations or {}).get(node.id, ""),
    )


def _bytes(spec: ClusterSpec, held: LayerRange | None, current: LayerRange | None) -> float:
    """Weights of `held` that are not among those of `current`."""
    if held is None:
        return 0.0
    model = spec.model
    last = model.num_layers - 1
    kept = range(0) if current is None else current.layers()
    new = [layer for layer in held.layers() if layer not in kept]
    return len(new) * model.layer_bytes + (0 in new) * model.embedding_bytes + (last in new) * model.head_bytes


def _alone(holding: Holding, flows: FlowModel) -> tuple[NodeId, Prediction] | None:
    """The node that would serve most by itself."""
    whole = LayerRange(0, holding.num_layers)
    best: tuple[NodeId, Prediction] | None = None
    for node in holding.usable():
        if holding.allows(node.id, whole):
            flow = flows.solve({node.id: whole})
            found = predict(holding, {node.id: whole}, flow)
            if found and (best is None or found.decode_tokens_per_s > best[1].decode_tokens_per_s):
                best = (node.id, found)
    return best


def _compared(plan: Plan, outcome: Outcome) -> tuple[PlanRow, ...]:
    if not outcome.compared:
        return ()
    rows = [PlanRow("helixd", plan, stages(_flow(plan)))]
    for found in outcome.compared:
        depth = stages(_flow(found.plan)) if found.plan else None
        rows.append(PlanRow(found.name, found.plan, depth, found.reason))
    return tuple(rows)
