"""When to plan and whether to adopt the plan: first plan, lost pipeline, or a gain worth moving layers for.

Runs the planner (in its own process) whenever membership or links changed and have settled. Keeps the words for why
there is no plan, for `/readyz` and clients. Serving never waits for it.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from helixd import logs
from helixd.coordinator.admission import Admission
from helixd.coordinator.epochs import Epochs
from helixd.coordinator.fleet import Fleet
from helixd.coordinator.planning import ModelSizes, PlannerFailed, PlanningOptions, build_spec, run_planner
from helixd.ids import NodeId
from helixd.plan.flow import FlowModel
from helixd.plan.plan import Infeasible, Plan
from helixd.plan.spec import ClusterSpec

log = logging.getLogger(__name__)

RETRY_S = 5.0


@dataclass(frozen=True, slots=True)
class ReplanOptions:
    """`gain`: the share by which predicted throughput must rise for layers to move."""

    wait_for_nodes: int = 1
    settle_s: float = 1.0
    gain: float = 0.1
    cooldown_s: float = 60.0


class Replanner:
    """Watches the fleet and keeps a plan in force."""

    def __init__(
        self, fleet: Fleet, epochs: Epochs, admission: Admission, model_name: str, sizes: ModelSizes,
        planning: PlanningOptions, options: ReplanOptions,
    ) -> None:  # fmt: skip
        self.why_no_plan = "no worker has joined yet"
        self.infeasible = False
        self.notes: Mapping[NodeId, str] = {}
        self._fleet = fleet
        self._epochs = epochs
        self._admission = admission
        self._model_name = model_name
        self._sizes = sizes
        self._planning = planning
        self._options = options
        self._changed = asyncio.Event()
        self._last_move_s: float | None = None

    def something_changed(self) -> None:
        """Membership, measurements or links are not what they were."""
        self._admission.something_changed()
        self._changed.set()

    async def run(self, probes_complete: Callable[[], bool]) -> None:
        """Plan when there is reason to, until cancelled."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            nodes = sum(1 for _ in self._fleet.ready_nodes())
            if nodes < self._options.wait_for_nodes:
                self.why_no_plan = f"{nodes} of {self._options.wait_for_nodes} nodes have joined and are measured"
                continue
            if not probes_complete():
                if self._epochs.active is None:
                    self.why_no_plan = "links between nodes are being measured"
                continue
            await asyncio.sleep(self._options.settle_s)
            if self._changed.is_set():
                continue
            await self._plan()

    async def _plan(self) -> None:
        try:
            spec, plan = await self._solve()
        except Infeasible as error:
            self.why_no_plan, self.infeasible = str(error), True
            logs.event(log, logging.WARNING, "no_placement", reason=str(error))
            return
        except PlannerFailed as error:
            self.why_no_plan = str(error)
            logs.event(log, logging.ERROR, "planner_failed", reason=str(error), retry_s=RETRY_S)
            await asyncio.sleep(RETRY_S)
            self._changed.set()
            return
        self.infeasible = False
        reason = self._why_adopt(spec, plan)
        if reason is not None:
            logs.event(
                log, logging.INFO, "plan_adopted", reason=reason, method=plan.method, solve_s=round(plan.solve_s, 3),
                max_flow_tokens_per_s=round(plan.max_flow_tokens_per_s, 1),
            )  # fmt: skip
            self._last_move_s = time.monotonic()
            self._epochs.push(plan)
        self.notes = self._notes(plan)

    def _notes(self, plan: Plan) -> Mapping[NodeId, str]:
        """A sentence on nodes that are idle or a bottleneck, after `plan` was adopted or not."""
        kept = self._epochs.coming or self._epochs.active
        said = plan.explanations or {}
        if kept is None or kept.plan.placement == plan.placement:
            return said
        held = kept.plan.placement
        unused = dict.fromkeys(plan.placement, "idle: a plan that uses it would not serve enough more to move layers")
        about_held = {node: text for node, text in (kept.plan.explanations or {}).items() if node in held}
        return about_held | {node: text for node, text in {**said, **unused}.items() if node not in held}

    async def _solve(self) -> tuple[ClusterSpec, Plan]:
        """Plan with the KV room the operator wants; where that fits nowhere, with as little as can serve."""
        holding = self._epochs.holding()
        spec = build_spec(self._fleet, self._model_name, self._sizes, self._planning, holding)
        try:
            return spec, await run_planner(spec, self._planning.time_limit_s)
        except Infeasible:
            tight = replace(self._planning, kv_fraction=0.0)
            spec = build_spec(self._fleet, self._model_name, self._sizes, tight, holding)
            return spec, await run_planner(spec, self._planning.time_limit_s)

    def _why_adopt(self, spec: ClusterSpec, plan: Plan) -> str | None:
        now_in_force = self._epochs.coming or self._epochs.active
        if now_in_force is None:
            return "first"
        usable = {node.id for node in spec.nodes}
        current = {n: r for n, r in now_in_force.plan.placement.items() if n in usable}
        # Also with the placement as it is: who is left may need hops that the schedules do not have.
        if self._epochs.coming is None and not self._admission.has_pipeline() and self._has_failed_or_lost():
            return "the pipeline is lost"
        if current == dict(plan.placement):
            return None
        flows = FlowModel(spec)
        kept = flows.value(current)
        if kept <= 0:
            return "the pipeline is lost"
        gain = flows.value(plan.placement) / kept - 1
        cooling = self._last_move_s is not None and time.monotonic() - self._last_move_s < self._options.cooldown_s
        if gain >= self._options.gain and not cooling:
            return f"{gain:.0%} more flow"
        return None

    def _has_failed_or_lost(self) -> bool:
        """Whether waiting for the active plan's nodes is of no use: some are gone or failed, or none is on its way."""
        active = self._epochs.active
        if active is None:
            return True
        lost = [n for n in active.plan.placement if n not in self._fleet.nodes]
        failed = [n for n, state in active.states.items() if state.state == "failed"]
        waiting = [n for n in active.plan.placement if n not in active.states or active.states[n].state == "loading"]
        return bool(lost or failed or not waiting)
