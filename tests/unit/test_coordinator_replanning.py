"""When a new plan is adopted: never for little, never too soon, always when nothing else serves."""

import asyncio
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from helixd.coordinator import replanning
from helixd.coordinator.drifting import DriftEvent
from helixd.coordinator.planning import ModelSizes, PlanningOptions
from helixd.coordinator.relay import Pair
from helixd.coordinator.replanning import Replanner, ReplanOptions
from helixd.ids import NodeId, PeerId
from helixd.layers import LayerRange
from helixd.plan.cluster.spec import COORDINATOR
from helixd.plan.plan import Hop, Infeasible, Plan
from helixd.solver.process import PlannerFailed
from tests.unit.plan_worlds import ranges

HERE = ranges({"a": (0, 4), "b": (4, 8)})
THERE = ranges({"a": (0, 3), "b": (3, 8)})


def plan(placement: Mapping[NodeId, LayerRange], flow: float, decode: float | None = None) -> Plan:
    return Plan(8, placement, {}, flow, predicted_decode_tokens_per_s=decode, explanations={})


class World:
    """A replanner among stand-ins: `answer` is what the planner says next."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **options: float) -> None:
        self.pushed: list[Plan] = []
        self.active: Any = None
        self.answer: Any = None
        self.asked: list[Any] = []
        self.pipeline = True
        nodes = self.nodes = {NodeId(name): SimpleNamespace(id=NodeId(name), measured=object()) for name in ("a", "b")}
        fleet: Any = SimpleNamespace(
            nodes=nodes, ready_nodes=lambda: iter(nodes.values()), links={}, peers={}, peer_of=lambda node: None
        )
        admission: Any = SimpleNamespace(something_changed=lambda: None, has_pipeline=lambda: self.pipeline)
        world = self

        class Epochs:
            coming = None

            @property
            def active(self) -> Any:
                return world.active

            def holding(self) -> dict[NodeId, LayerRange]:
                return {}

            def push(self, plan: Plan, relayed: frozenset[Pair] = frozenset()) -> None:
                world.pushed.append(plan)
                world.active = SimpleNamespace(plan=plan, states={}, relayed=relayed)

        async def answer(spec: object, planning: object, in_force: object) -> Any:
            self.asked.append(in_force)
            if isinstance(self.answer, Exception):
                raise self.answer
            return self.answer

        monkeypatch.setattr(replanning, "run_planner", answer)
        monkeypatch.setattr(replanning, "build_spec", lambda *a: None)
        sizes = ModelSizes(1, 0, 0, 1, 1, 8)
        epochs: Any = Epochs()
        self.replanner = Replanner(
            fleet, epochs, admission, "m", sizes, PlanningOptions(), ReplanOptions(settle_s=0.0, **options)
        )  # fmt: skip

    async def replan(self) -> None:
        await self.replanner._plan()


async def test_the_first_plan_is_taken_and_the_same_one_is_not_taken_again(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, cooldown_s=0.0)
    world.answer = (plan(HERE, 100, 10), None)
    await world.replan()
    assert len(world.pushed) == 1
    await world.replan()
    assert len(world.pushed) == 1
    # What is in force is judged along with the search.
    assert world.asked == [None, HERE]


@pytest.mark.parametrize(
    ("kept", "new", "moves"),
    [
        (plan(HERE, 100, 10), plan(THERE, 100, 11), True),
        (plan(HERE, 100, 10), plan(THERE, 100, 10.9), False),
        # Flow is not what people see.
        (plan(HERE, 100, 10), plan(THERE, 300, 10), False),
        (plan(HERE, 100, 10), plan(THERE, 90, 12), True),
        (plan(HERE, 100), plan(THERE, 111), True),
        (plan(HERE, 100), plan(THERE, 105), False),
        # No pipeline is left of it.
        (None, plan(THERE, 5, 1), True),
    ],
)
async def test_layers_move_for_a_gain_in_output(
    kept: Plan | None, new: Plan, moves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(monkeypatch, cooldown_s=0.0)
    world.answer = (plan(HERE, 100, 10), None)
    await world.replan()
    world.answer = (new, kept)
    await world.replan()
    assert len(world.pushed) == 1 + moves


async def test_a_gain_that_comes_too_soon_is_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, cooldown_s=0.2)
    world.answer = (plan(HERE, 100, 10), None)
    running = asyncio.create_task(world.replanner.run(lambda: True))
    world.replanner.something_changed()
    async with asyncio.timeout(10):
        while not world.pushed:
            await asyncio.sleep(0.01)
        world.answer = (plan(THERE, 100, 20), plan(HERE, 100, 10))
        world.replanner.something_changed()
        # Nothing else changes.
        while len(world.pushed) < 2:
            await asyncio.sleep(0.01)
    assert len(world.asked) >= 3
    running.cancel()


async def test_only_the_first_plan_waits_for_all_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are left when one is lost for good must be planned for."""
    world = World(monkeypatch, cooldown_s=0.0, wait_for_nodes=2)
    world.answer = (plan(HERE, 100, 10), None)
    gone = world.nodes.pop(NodeId("b"))
    running = asyncio.create_task(world.replanner.run(lambda: True))
    world.replanner.something_changed()
    await asyncio.sleep(0.05)
    assert world.replanner.why_no_plan == "1 of 2 nodes have joined and are measured"
    async with asyncio.timeout(10):
        world.nodes[NodeId("b")] = gone
        world.replanner.something_changed()
        while not world.pushed:
            await asyncio.sleep(0.01)
        del world.nodes[NodeId("b")]
        world.pipeline = False
        world.answer = (plan(ranges({"a": (0, 8)}), 50, 5), None)
        world.replanner.something_changed()
        while len(world.pushed) < 2:
            await asyncio.sleep(0.01)
    running.cancel()


async def test_a_planner_that_fails_or_finds_nothing_leaves_what_is_in_force(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, cooldown_s=0.0)
    monkeypatch.setattr(replanning, "RETRY_S", 0.0)
    world.answer = (plan(HERE, 100, 10), None)
    await world.replan()
    for error in (PlannerFailed("status -9"), Infeasible("needs 2 GiB, nodes offer 1 GiB")):
        world.answer = error
        await world.replan()
        assert world.replanner.why_no_plan == str(error)
    assert [found.placement for found in world.pushed] == [HERE]


@pytest.mark.parametrize(("apart", "tries"), [(False, 2), (True, 4)])
async def test_relaying_is_tried_when_nothing_else_connects(
    apart: bool, tries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(monkeypatch)
    pairs: frozenset[Pair] = frozenset({frozenset((PeerId("a"), PeerId("b")))}) if apart else frozenset()
    monkeypatch.setattr(replanning, "relayable", lambda fleet: pairs)
    built: list[Any] = []
    monkeypatch.setattr(replanning, "build_spec", lambda *a: built.append(a[5]))
    world.answer = Infeasible("nothing connects them")
    await world.replan()
    assert built == [(), (), pairs, pairs][:tries]
    assert world.replanner.why_no_plan == "nothing connects them"
    built.clear()
    world.answer = (plan(HERE, 100, 10), None)
    await world.replan()
    assert built == [()], "what connects without is taken"
    assert world.active.relayed == frozenset()


def split(shares: Mapping[str, float], decode: float) -> Plan:
    """The one placement with other weights."""
    schedule = {COORDINATOR: tuple(Hop(NodeId(node), share) for node, share in shares.items())}
    return Plan(8, HERE, schedule, 100, predicted_decode_tokens_per_s=decode, explanations={})


async def drifted(world: World, answer: Any) -> DriftEvent:
    """What becomes of a drift when the planner answers this."""
    world.answer = answer
    event = DriftEvent("a", "a decode takes 3 times as long", 0.0)
    world.replanner.drifted(event)
    await world.replan()
    return event


@pytest.mark.parametrize(
    ("answer", "moves", "decision"),
    [
        ((plan(THERE, 100, 11), plan(HERE, 100, 10)), True, "a new plan: 10% more output"),
        (
            (plan(THERE, 100, 10.9), plan(HERE, 100, 10)),
            False,
            "the plan stays: another would give 9% more output, layers move for 10%",
        ),
        (
            (split({"a": 80, "b": 20}, 10), split({"a": 80, "b": 20}, 10)),
            True,
            "a new plan: layers stay, up to 30% of what passes a node goes on elsewhere",
        ),
        (
            (split({"a": 55, "b": 45}, 10), split({"a": 55, "b": 45}, 10)),
            False,
            "the plan stays: its placement is still the best",
        ),
        (Infeasible("too little memory"), False, "there is no other placement: too little memory"),
    ],
)
async def test_a_drift_is_told_what_becomes_of_it(
    answer: Any, moves: bool, decision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(monkeypatch, cooldown_s=0.0)
    world.answer = (split({"a": 50, "b": 50}, 10), None)
    await world.replan()
    event = await drifted(world, answer)
    assert event.decision == decision
    assert len(world.pushed) == 1 + moves


async def test_without_a_drift_other_shares_are_no_reason_to_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, cooldown_s=0.0)
    world.answer = (split({"a": 50, "b": 50}, 10), None)
    await world.replan()
    world.answer = (split({"a": 80, "b": 20}, 10),) * 2
    await world.replan()
    assert len(world.pushed) == 1


async def test_a_drift_waits_for_its_decision_while_layers_have_just_moved_or_the_planner_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(monkeypatch, cooldown_s=0.2)
    monkeypatch.setattr(replanning, "RETRY_S", 0.0)
    world.answer = (plan(HERE, 100, 10), None)
    await world.replan()
    event = await drifted(world, PlannerFailed("status -9"))
    assert event.decision == ""
    world.answer = (plan(THERE, 100, 20), plan(HERE, 100, 10))
    await world.replan()
    assert (event.decision, len(world.pushed)) == ("", 1)
    await asyncio.sleep(0.25)
    await world.replan()
    assert (event.decision, len(world.pushed)) == ("a new plan: 100% more output", 2)
