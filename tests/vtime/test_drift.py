"""A node or a link that is not any more what it was measured to be, with the real planner and nodes at work."""

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import patch

import pytest

from helixd.coordinator.figures import CoordinatorFigures
from helixd.coordinator.planning import PlanningOptions
from helixd.ids import NodeId, PeerId
from helixd.layers import LayerRange
from helixd.plan.cluster.spec import ClusterSpec
from helixd.plan.holding import Holding
from helixd.plan.judge import in_force as judged
from helixd.plan.plan import Plan
from helixd.plan.planner import plan_cluster
from helixd.plan.replan import replan
from tests.vtime.invariants import settle
from tests.vtime.world import COORDINATOR, World, world

HOLD_S = COORDINATOR.drift.hold_s
SEEN_S = 12.0
"""Until a gauge follows what a node does, and its status is told."""
SWITCHED_S = 10.0


async def planner(
    spec: ClusterSpec, options: PlanningOptions, in_force: Mapping[NodeId, LayerRange] | None = None
) -> tuple[Plan, Plan | None]:
    """What the planner's process does, in no time."""
    await asyncio.sleep(0.2)
    if any(node.current_range is not None for node in spec.nodes):
        plan = replan(spec, load_bytes_per_s=options.load_bytes_per_s, horizon_s=options.horizon_s).plan
    else:
        plan = plan_cluster(spec)
    return plan, None if in_force is None else judged(Holding(spec), in_force)


@contextmanager
def serving(*names: str) -> Iterator[World]:
    with world(1) as w, patch("helixd.coordinator.replanning.run_planner", planner):
        for name in names:
            w.start_worker(name)
        w.wait_until(lambda: w.coordinator.readiness().ready, 20.0, "it does not serve")
        w.advance(10.0)
        yield w
        settle(w)


def placement(w: World) -> dict[str, tuple[int, int]]:
    active = w.coordinator.epochs.active
    assert active is not None
    return {node: layers.to_pair() for node, layers in active.plan.placement.items()}


def busy(w: World, seconds: float) -> None:
    """Keep two streams going for so long."""
    until_s = w.loop.time() + seconds
    while w.loop.time() < until_s:
        while len(w.clients.running) < 2:
            w.clients.ask(tuple(range(12)), 40, seed=len(w.clients.all))
        w.advance(1.0)


def test_a_node_that_slows_gives_up_layers_once_it_was_slow_for_long() -> None:
    with serving("w0", "w1", "w2") as w:
        busy(w, 20.0)
        before = placement(w)
        slow = "w0"
        assert slow in before
        w.slow(slow, 30.0)
        busy(w, HOLD_S - SEEN_S)
        assert placement(w) == before
        busy(w, 2 * SEEN_S + SWITCHED_S)
        after = placement(w)
        assert slow not in after
        [event] = w.coordinator.drift.events
        assert event.subject == slow
        assert "times as long as when it was measured" in event.sentence
        assert event.decision.startswith("a new plan: ")
        view = w.coordinator.cluster_view()
        assert [told["decision"] for told in view["drift"]] == [event.decision]  # type: ignore[index,call-overload]
        figures = {
            (sample.name, *sample.labels.values()): sample.value
            for family in CoordinatorFigures(w.coordinator).collect()
            for sample in family.samples
        }
        assert figures["helixd_drifts_total",] == 1
        assert figures["helixd_node_slowdown_planned", "w0", "decode"] > 2
        assert figures["helixd_node_slowdown_planned", "w1", "decode"] == 1
        assert figures["helixd_node_slowdown", "w1", "decode"] == pytest.approx(1.0)
        # What is believed now is no news.
        busy(w, 2 * HOLD_S)
        assert w.coordinator.drift.count == 1
        assert placement(w) == after


def test_a_node_that_recovers_in_time_changes_nothing() -> None:
    with serving("w0", "w1", "w2") as w:
        busy(w, 20.0)
        before, epoch = placement(w), w.last_epoch
        slow = "w0"
        for _ in range(2):
            w.slow(slow, 10.0)
            busy(w, HOLD_S - SEEN_S)
            w.slow(slow, 1.0)
            busy(w, HOLD_S)
        assert (placement(w), w.last_epoch) == (before, epoch)
        assert w.coordinator.drift.count == 0
        assert w.coordinator.fleet.nodes[NodeId(slow)].slowdown == (1.0, 1.0)


def test_a_slow_node_without_which_nothing_serves_is_asked_about_once() -> None:
    with serving("w0", "w1") as w:
        busy(w, 10.0)
        w.slow("w0", 20.0)
        busy(w, HOLD_S + 2 * SEEN_S)
        assert [event.subject for event in w.coordinator.drift.events] == ["w0"]
        epoch = w.last_epoch
        busy(w, 2 * HOLD_S)
        assert w.coordinator.drift.count == 1
        assert w.last_epoch == epoch


def test_a_node_left_out_for_being_slow_is_measured_again_and_taken_back() -> None:
    with serving("w0", "w1", "w2") as w, patch("helixd.coordinator.suspects.AGAIN_S", 120.0):
        busy(w, 10.0)
        assert "w0" in placement(w)
        w.slow("w0", 100.0)
        busy(w, HOLD_S + 2 * SEEN_S + SWITCHED_S)
        assert "w0" not in placement(w)
        # It is as slow as ever: the new measurement says so, and nothing changes.
        w.wait_until(lambda: _decode_s(w, "w0") > 0.05, 150.0, "it is not measured again", 1.0)
        w.advance(5.0)
        assert "w0" not in placement(w)
        w.slow("w0", 1.0)
        w.wait_until(lambda: _decode_s(w, "w0") < 0.05, 300.0, "it is not measured a second time", 1.0)
        w.advance(SWITCHED_S)
        assert "w0" in placement(w)
        # One that serves is not taken from its work for that.
        assert w.coordinator.drift.count == 1


def test_a_link_that_got_longer_is_planned_with_as_it_is() -> None:
    with serving("w0", "w1") as w:
        busy(w, 10.0)
        link = w.network
        for one, other in (("w0", "w1"), ("w1", "w0")):
            way = link.way(_peer(one), _peer(other))
            way.conditions = replace(way.conditions, latency_s=0.05)
        busy(w, HOLD_S + 2 * SEEN_S)
        subjects = {event.subject for event in w.coordinator.drift.events}
        assert subjects == {"w0 -> w1", "w1 -> w0"}
        assert w.coordinator.fleet.links[_peer("w0"), _peer("w1")].rtt_s == pytest.approx(0.1)
        busy(w, 2 * HOLD_S)
        assert w.coordinator.drift.count == 2


def _peer(name: str) -> PeerId:
    return PeerId(name)


def _decode_s(w: World, node: str) -> float:
    measured = w.coordinator.fleet.nodes[NodeId(node)].measured
    assert measured is not None
    return measured.decode_layer_time_s[0][1]
