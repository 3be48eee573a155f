"""When to plan and whether to adopt the plan: first plan, lost pipeline, or a gain worth moving layers for.

Runs the planner (in its own process) whenever membership or links changed and have settled, or what is measured at work
has drifted. Keeps the words for why there is no plan, for `/readyz` and clients. Serving never waits for it.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from helixd import logs
from helixd.coordinator.admission import Admission
from helixd.coordinator.drifting import DriftEvent
from helixd.coordinator.epochs import Epochs
from helixd.coordinator.fleet import Fleet
from helixd.coordinator.planning import ModelSizes, PlanningOptions, build_spec, run_planner
from helixd.coordinator.relay import Pair, relay_notes, relayable, used_pairs
from helixd.ids import NodeId
from helixd.plan.adopt import gain, rerouted
from helixd.plan.plan import Infeasible, Plan
from helixd.solver.process import PlannerFailed

log = logging.getLogger(__name__)

RETRY_S = 5.0
NOTHING_ELSE = "they cannot reach each other, and no placement does without"
RETRY_FAILED_MAX_S = 600.0


@dataclass(frozen=True, slots=True)
class ReplanOptions:
    """`gain`: the share by which predicted throughput must rise for layers to move.

    `retry_failed_s`: a node that could not load is planned with again after so long, twice as long each time.
    """

    wait_for_nodes: int = 1
    settle_s: float = 1.0
    gain: float = 0.1
    cooldown_s: float = 60.0
    retry_failed_s: float = 30.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a plan is adopted, and why or why not. `later`: it is looked at again."""

    adopt: bool
    why: str
    later: bool = False


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
        self._later: asyncio.TimerHandle | None = None
        self._drifts: list[DriftEvent] = []

    def something_changed(self) -> None:
        """Membership, measurements or links are not what they were."""
        self._admission.something_changed()
        self._changed.set()

    def drifted(self, event: DriftEvent) -> None:
        """What is planned with is not what it was; the event is told what becomes of it."""
        self._drifts.append(event)
        self.something_changed()

    def node_failed(self, node_id: NodeId, reason: str) -> None:
        """A node could not load what it was to hold: plan without it for a while. A new life of it starts afresh."""
        node = self._fleet.nodes[node_id]
        node.problem = reason or "failed"
        wait_s = min(RETRY_FAILED_MAX_S, self._options.retry_failed_s * 2**node.failures)
        node.failures += 1

        def try_again() -> None:
            if self._fleet.nodes.get(node_id) is node:
                node.problem = ""
                self.something_changed()

        asyncio.get_running_loop().call_later(wait_s, try_again)
        self.something_changed()

    async def run(self, probes_complete: Callable[[], bool]) -> None:
        """Plan when there is reason to, until cancelled."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            nodes = sum(1 for node in self._fleet.nodes.values() if node.measured is not None)
            first = self._epochs.active is None and self._epochs.coming is None
            if first and nodes < self._options.wait_for_nodes:
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
        drifts, self._drifts = self._drifts, []
        try:
            plan, kept, relayed = await self._solve()
        except Infeasible as error:
            self.why_no_plan, self.infeasible = str(error), True
            _decided(drifts, f"there is no other placement: {error}")
            logs.event(log, logging.WARNING, "no_placement", reason=str(error))
            return
        except PlannerFailed as error:
            self.why_no_plan = str(error)
            self._drifts = drifts + self._drifts
            logs.event(log, logging.ERROR, "planner_failed", reason=str(error), retry_s=RETRY_S)
            await asyncio.sleep(RETRY_S)
            self._changed.set()
            return
        self.infeasible = False
        verdict = self._verdict(plan, kept, relayed, after_drift=bool(drifts))
        if verdict.later:
            self._drifts = drifts + self._drifts
        else:
            _decided(drifts, ("a new plan: " if verdict.adopt else "the plan stays: ") + verdict.why)
        if verdict.adopt:
            logs.event(
                log, logging.INFO, "plan_adopted", reason=verdict.why, method=plan.method,
                solve_s=round(plan.solve_s, 3), max_flow_tokens_per_s=round(plan.max_flow_tokens_per_s, 1),
            )  # fmt: skip
            self._last_move_s = time.monotonic()
            for pair in map(sorted, relayed):
                logs.event(log, logging.WARNING, "relayed", workers=pair, reason=NOTHING_ELSE)
            self._epochs.push(plan, relayed)
        self.notes = self._notes(plan)

    def _notes(self, plan: Plan) -> Mapping[NodeId, str]:
        """A sentence on nodes that are idle or a bottleneck, after `plan` was adopted or not."""
        kept = self._epochs.coming or self._epochs.active
        said = plan.explanations or {}
        if kept is None:
            return said
        relayed = relay_notes(self._fleet, kept.plan, kept.relayed)
        if kept.plan.placement == plan.placement:
            return {**said, **relayed}
        held = kept.plan.placement
        unused = dict.fromkeys(plan.placement, "idle: a plan that uses it would not serve enough more to move layers")
        about_held = {node: text for node, text in (kept.plan.explanations or {}).items() if node in held}
        return about_held | {node: text for node, text in {**said, **unused}.items() if node not in held} | relayed

    async def _solve(self) -> tuple[Plan, Plan | None, frozenset[Pair]]:
        """The new plan, the one in force as it is worth now, and the workers that the new one relays between.

        With the KV room the operator wants; where that fits nowhere, with as little as can serve; and only where that
        connects nothing either, over the coordinator's own links.
        """
        holding = self._epochs.holding()
        now = self._epochs.coming or self._epochs.active
        placement = None if now is None else now.plan.placement
        pairs = relayable(self._fleet)
        tight = replace(self._planning, kv_fraction=0.0)
        tries = [(options, relayed) for relayed in ((), pairs) for options in (self._planning, tight)]
        why: Infeasible | None = None
        for options, relayed in tries if pairs else tries[:2]:
            spec = build_spec(self._fleet, self._model_name, self._sizes, options, holding, relayed)
            try:
                plan, kept = await run_planner(spec, options, placement)
            except Infeasible as error:
                why = error
            else:
                return plan, kept, used_pairs(self._fleet, plan, relayed)
        assert why is not None
        raise why

    def _verdict(
        self, plan: Plan, kept: Plan | None, relayed: frozenset[Pair], *, after_drift: bool = False
    ) -> Verdict:
        """Whether to switch to `plan`, or to stay with `kept`, which is what is in force as it is worth now.

        With the layers where they are, other shares of the flow are worth a switch only `after_drift`: nothing moves.
        """
        now_in_force = self._epochs.coming or self._epochs.active
        if now_in_force is None:
            return Verdict(True, "first")
        # Also with the placement as it is: who is left may need hops that the schedules do not have.
        if self._epochs.coming is None and not self._admission.has_pipeline() and self._has_failed_or_lost():
            return Verdict(True, "the pipeline is lost")
        there = {pair for pair in now_in_force.relayed if pair <= self._fleet.peers.keys()}
        if there - relayable(self._fleet):
            return Verdict(True, "workers that were relayed reach each other again")
        usable = {node.id for node in self._fleet.ready_nodes()}
        if {n: r for n, r in now_in_force.plan.placement.items() if n in usable} == dict(plan.placement):
            elsewhere = rerouted(now_in_force.plan, plan) if after_drift else 0.0
            if elsewhere and elsewhere >= self._options.gain:
                return Verdict(True, f"layers stay, up to {elsewhere:.0%} of what passes a node goes on elsewhere")
            return Verdict(False, "its placement is still the best")
        if kept is None:
            return Verdict(True, "the pipeline is lost")
        found = gain(kept, plan)
        if found.share < self._options.gain:
            return Verdict(False, f"another would give {found}, layers move for {self._options.gain:.0%}")
        if self._last_move_s is not None:
            cool_s = self._last_move_s + self._options.cooldown_s - time.monotonic()
            if cool_s > 0:
                self._again(cool_s)
                return Verdict(False, f"layers moved only lately, {found} waits", later=True)
        return Verdict(True, str(found))

    def _again(self, in_s: float) -> None:
        """Plan again then, even if nothing changes until then."""
        if self._later is not None:
            self._later.cancel()
        self._later = asyncio.get_running_loop().call_later(in_s, self._changed.set)

    def _has_failed_or_lost(self) -> bool:
        """Whether waiting for the active plan's nodes is of no use: some are gone or failed, or none is on its way."""
        active = self._epochs.active
        if active is None:
            return True
        lost = [n for n in active.plan.placement if n not in self._fleet.nodes]
        failed = [n for n, state in active.states.items() if state.state == "failed"]
        waiting = [n for n in active.plan.placement if n not in active.states or active.states[n].state == "loading"]
        return bool(lost or failed or not waiting)


def _decided(drifts: Sequence[DriftEvent], decision: str) -> None:
    for event in drifts:
        event.decision = decision
        logs.event(log, logging.INFO, "drift_decided", subject=event.subject, reason=event.sentence, decision=decision)
