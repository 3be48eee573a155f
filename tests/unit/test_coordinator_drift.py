"""What counts as drifted, on both sides of every limit; no readings make plans follow each other for ever."""

import math
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helixd.coordinator.drift import GAP_S, MOST_DOUBLINGS, QUIET, Drift, DriftJudge, DriftOptions, Reading
from helixd.coordinator.drifting import DriftEvent, DriftWatch
from helixd.coordinator.fleet import Fleet, LinkFact, Node, Slowdown
from helixd.coordinator.probing import ALIKE_RTT_S, HUB, Pair
from helixd.coordinator.suspects import AGAIN_S, MOST_S, Suspects
from helixd.ids import NodeId, PeerId
from helixd.protocol.messages import Measure, NodeHardware, NodeStatus, PathSeen

FACTOR, HOLD_S = 2.0, 60.0
BEYOND = 1.0001


def judge() -> DriftJudge:
    return DriftJudge(DriftOptions(FACTOR, HOLD_S))


def watch(judged: DriftJudge, measured: float, seconds: float, *, began_s: float = 0.0) -> tuple[Drift | None, float]:
    """The first drift of a reading that stays at `measured` where 1 is believed, and when it was found."""
    for second in range(round(seconds) + 1):
        found = judged.see("n", [Reading("decode", measured, 1.0)], began_s + second)
        if found is not None:
            return found, began_s + second
    return None, began_s + seconds


@pytest.mark.parametrize(
    ("measured", "drifts"),
    [
        (FACTOR, False), (FACTOR * BEYOND, True), (1 / FACTOR, False), (1 / FACTOR / BEYOND, True), (1.0, False),
        (1000.0, True), (0.001, True),
    ],
)  # fmt: skip
def test_only_more_than_the_factor_either_way_is_off(measured: float, drifts: bool) -> None:
    found, _ = watch(judge(), measured, HOLD_S + 1)
    assert (found is not None) == drifts


def test_it_has_drifted_after_more_than_the_time_and_not_before() -> None:
    judged = judge()
    assert watch(judged, 3.0, HOLD_S)[0] is None
    found = judged.see("n", [Reading("decode", 3.0, 1.0)], HOLD_S + 0.001)
    assert found is not None
    assert found.for_s == pytest.approx(HOLD_S + 0.001)
    assert found.reading.measured == 3.0


@pytest.mark.parametrize("between", [1.0, FACTOR, 1 / FACTOR, 0.1])
def test_a_reading_in_between_or_off_the_other_way_starts_the_time_anew(between: float) -> None:
    judged = judge()
    assert watch(judged, 3.0, HOLD_S - 1)[0] is None
    assert judged.see("n", [Reading("decode", between, 1.0)], HOLD_S) is None
    assert watch(judged, 3.0, HOLD_S - 1, began_s=HOLD_S + 1)[0] is None
    assert watch(judged, 3.0, 10, began_s=2 * HOLD_S + 1)[0] is not None


@pytest.mark.parametrize(("gap_s", "drifts"), [(GAP_S, True), (GAP_S * BEYOND, False)])
def test_what_was_not_seen_for_a_while_starts_anew(gap_s: float, drifts: bool) -> None:
    judged = judge()
    watch(judged, 3.0, HOLD_S - 1)
    found = judged.see("n", [Reading("decode", 3.0, 1.0)], HOLD_S - 1 + gap_s)
    assert (found is not None) == drifts


def test_each_quantity_has_its_own_time_and_one_is_enough() -> None:
    judged = judge()
    for second in range(round(HOLD_S) + 2):
        readings = [Reading("prefill", 1.0, 1.0), Reading("decode", 5.0, 2.0)]
        found = judged.see("n", readings, float(second))
    assert found is not None
    assert found.reading.quantity == "decode"


def test_a_drift_is_told_once_when_it_is_believed() -> None:
    judged = judge()
    _, at_s = watch(judged, 3.0, HOLD_S + 1)
    for second in range(1000):
        assert judged.see("n", [Reading("decode", 3.0, 3.0)], at_s + second) is None


@pytest.mark.parametrize("doublings", [1, 2, MOST_DOUBLINGS, MOST_DOUBLINGS + 3])
def test_who_keeps_drifting_is_believed_ever_later(doublings: int) -> None:
    judged, now_s = judge(), 0.0
    for _ in range(doublings):
        found, now_s = watch(judged, 3.0, 1e5, began_s=now_s)
        assert found is not None
    hold_s = HOLD_S * 2 ** min(doublings, MOST_DOUBLINGS)
    found, again_s = watch(judged, 3.0, 1e5, began_s=now_s)
    assert found is not None
    assert again_s - now_s == pytest.approx(hold_s, abs=1.5)


@pytest.mark.parametrize(("quiet_s", "patient"), [((QUIET - 2) * HOLD_S, True), (QUIET * HOLD_S + 1, False)])
def test_after_a_long_quiet_the_first_time_counts_again(quiet_s: float, patient: bool) -> None:
    judged = judge()
    _, at_s = watch(judged, 3.0, HOLD_S + 1)
    judged.see("n", [Reading("decode", 1.0, 1.0)], at_s + quiet_s)
    found, _ = watch(judged, 3.0, HOLD_S + 1, began_s=at_s + quiet_s)
    assert (found is None) == patient


def test_a_new_life_starts_afresh_but_its_drifts_are_remembered() -> None:
    judged = judge()
    watch(judged, 3.0, HOLD_S)
    judged.forget("n")
    assert judged.off_for_s("n", HOLD_S) is None
    found, at_s = watch(judged, 3.0, HOLD_S + 1, began_s=HOLD_S)
    assert found is not None
    judged.forget("n")
    assert watch(judged, 3.0, 2 * HOLD_S - 1, began_s=at_s)[0] is None


@given(
    st.lists(st.tuples(st.floats(0.01, 100), st.floats(0.5, 400)), min_size=1, max_size=60),
    st.sampled_from([1.1, 2.0, 5.0]),
)
def test_no_readings_make_plans_follow_each_other(stretches: list[tuple[float, float]], factor: float) -> None:
    """Whatever is measured, drifts are at least the time apart, ever further, and each corrects by the factor."""
    judged, now_s, believed = DriftJudge(DriftOptions(factor, HOLD_S)), 0.0, 1.0
    told: list[float] = []
    for measured, lasts_s in stretches:
        until_s = now_s + lasts_s
        while now_s < until_s:
            found = judged.see("n", [Reading("decode", measured, believed)], now_s)
            if found is not None:
                assert not 1 / factor <= measured / believed <= factor
                believed = measured
                told.append(now_s)
            now_s += 5.0
    gaps = [after - before for before, after in pairwise(told)]
    for number, gap_s in enumerate(gaps, start=1):
        assert gap_s > HOLD_S
        assert gap_s > HOLD_S * 2 ** min(number, MOST_DOUBLINGS) or gap_s > QUIET * HOLD_S or sum(gaps) > QUIET * HOLD_S
    longest = HOLD_S * 2**MOST_DOUBLINGS
    assert len(told) <= 1 + MOST_DOUBLINGS + now_s / longest + now_s / (QUIET * HOLD_S) * MOST_DOUBLINGS


class Watched:
    """A watch over a fleet of two workers, fed once a second."""

    def __init__(self) -> None:
        self.fleet = Fleet()
        self.events: list[DriftEvent] = []
        self.planned = True
        self.probed: list[Pair] = []
        self.watch = DriftWatch(
            self.fleet, DriftOptions(FACTOR, HOLD_S), PeerId("hub"), self.events.append,
            lambda node: self.planned, self.probed.append,
        )  # fmt: skip
        for name in ("a", "b"):
            node = Node(NodeId(name), PeerId(name), NodeHardware(name, "cpu", "x", 1, 1))
            self.fleet.nodes[node.id] = node
        self.now_s = 0.0

    @property
    def node(self) -> Node:
        return self.fleet.nodes[NodeId("a")]

    def say(self, seconds: float, prefill: float = 0.0, decode: float = 0.0, *paths: PathSeen) -> None:
        for _ in range(round(seconds)):
            status = NodeStatus("a", 1, 0.0, 0, 0, 0, 1, 0, 0, 0.0, 0, 0, prefill, decode, list(paths))
            self.watch.on_status(self.node, status, self.now_s)
            self.now_s += 1.0


def test_a_slow_node_is_planned_with_as_slow_and_is_told_once() -> None:
    world = Watched()
    world.say(HOLD_S + 1, 1.2, 3.0)
    assert world.events == []
    assert world.node.slowdown == Slowdown(1.0, 1.0)
    world.say(1, 1.2, 3.0)
    assert world.node.slowdown == Slowdown(1.2, 3.0)
    assert [event.sentence for event in world.events] == [
        "a decode takes 3 times as long as when it was measured, 1 times was planned with, for 61 s now"
    ]
    world.say(1000, 1.2, 3.0)
    assert len(world.events) == 1
    # And back, which takes twice as long to be believed.
    world.say(2 * HOLD_S + 1, 1.0, 1.0)
    assert len(world.events) == 1
    world.say(2, 1.0, 1.0)
    assert world.node.slowdown == Slowdown(1.0, 1.0)
    assert world.watch.count == 2


def test_what_is_not_measured_stays_as_it_was() -> None:
    world = Watched()
    world.say(HOLD_S + 2, 0.0, 3.0)
    assert world.node.slowdown == Slowdown(1.0, 3.0)
    world.say(1000)
    assert world.node.slowdown == Slowdown(1.0, 3.0)
    assert len(world.events) == 1


def test_a_node_says_for_how_long_it_has_been_off() -> None:
    world = Watched()
    assert world.watch.off_for_s(world.node, 0.0) is None
    world.say(31, 0.0, 3.0)
    assert world.watch.off_for_s(world.node, 30.0) == pytest.approx(30.0)
    assert world.watch.off_for_s(world.node, 30.0 + GAP_S + 1) is None


@pytest.mark.parametrize(
    ("goodput", "rtt_s", "drifts"),
    [
        (50e6, 0.02, False),
        (49e6, 0.02, True),
        (201e6, 0.02, True),
        (0.0, 0.02, False),
        (0.0, 0.041, True),
        (0.0, 0.0099, True),
        (0.0, 0.0, False),
    ],
)
def test_a_link_is_planned_with_as_it_is(goodput: float, rtt_s: float, drifts: bool) -> None:
    world = Watched()
    pair = (PeerId("a"), PeerId("b"))
    world.fleet.links[pair] = LinkFact(0.02, 100e6)
    world.say(HOLD_S + 2, 0.0, 0.0, PathSeen("b", rtt_s, goodput))
    assert bool(world.events) == drifts
    fact = world.fleet.links[pair]
    if drifts:
        assert fact == LinkFact(rtt_s or 0.02, goodput or 100e6)
        assert world.events[0].sentence.startswith("a -> b ")
    else:
        assert fact == LinkFact(0.02, 100e6)


def test_short_round_trips_are_all_alike() -> None:
    world = Watched()
    world.fleet.links[PeerId("a"), PeerId("b")] = LinkFact(0.0001, 1e9)
    world.say(200, 0.0, 0.0, PathSeen("b", 2 * ALIKE_RTT_S, 0.0))
    assert world.events == []
    world.say(200, 0.0, 0.0, PathSeen("b", 2 * ALIKE_RTT_S * BEYOND, 0.0))
    assert len(world.events) == 1


def test_the_way_to_the_coordinator_is_watched_too_and_unusable_links_are_not() -> None:
    world = Watched()
    world.fleet.links[HUB, PeerId("a")] = LinkFact(0.01, 1e9)
    world.fleet.links[PeerId("a"), PeerId("b")] = LinkFact(0.0, 0.0, "refused")
    world.say(200, 0.0, 0.0, PathSeen("hub", 0.1, 0.0), PathSeen("b", 1.0, 1.0), PathSeen("stranger", 1.0, 1.0))
    assert [event.subject for event in world.events] == ["coordinator -> a"]
    assert world.fleet.links[HUB, PeerId("a")] == LinkFact(0.1, 1e9)


def test_absurd_figures_are_bounded() -> None:
    world = Watched()
    world.say(HOLD_S + 2, 1e6, 1e-300)
    assert world.node.slowdown == Slowdown(100.0, 0.01)
    assert all(math.isfinite(value) for value in world.node.slowdown)


def test_a_lost_worker_is_forgotten() -> None:
    world = Watched()
    peer: Any = SimpleNamespace(nodes=["a"], hello=SimpleNamespace(protocol=1))
    world.fleet.peers[PeerId("a")] = peer
    world.fleet.links[PeerId("a"), PeerId("b")] = LinkFact(0.02, 100e6)
    slow = PathSeen("b", 0.02, 1e6)
    world.say(HOLD_S, 0.0, 3.0, slow)
    world.watch.on_peer_lost(PeerId("a"), [world.node])
    world.say(HOLD_S, 0.0, 3.0, slow)
    assert world.events == []


def test_what_was_found_slow_is_looked_at_again_ever_more_rarely() -> None:
    suspects, looked = Suspects(), []
    suspects.add("n", 0.0)
    for second in range(0, 40_000, 10):
        if suspects.due("n", float(second)):
            looked.append(second)
    assert looked[:4] == [AGAIN_S, 3 * AGAIN_S, 7 * AGAIN_S, 15 * AGAIN_S]
    assert looked[4] - looked[3] == MOST_S
    suspects.drop("n")
    assert not suspects.due("n", 1e9)


@pytest.mark.parametrize(("protocol", "planned", "asked"), [(2, False, 1), (2, True, 0), (1, False, 0)])
def test_a_slow_node_that_no_plan_uses_is_measured_again(protocol: int, planned: bool, asked: int) -> None:
    world = Watched()
    sent: list[Any] = []
    peer: Any = SimpleNamespace(
        nodes=["a"], hello=SimpleNamespace(protocol=protocol), outbox=SimpleNamespace(post=sent.append)
    )
    world.fleet.peers[PeerId("a")] = peer
    world.say(HOLD_S + 2, 0.0, 3.0)
    world.planned = planned
    world.say(AGAIN_S - 2)
    assert sent == []
    world.say(3)
    assert [frame.kind for frame in sent] == [Measure.KIND] * asked


def test_a_link_that_was_corrected_is_probed_again() -> None:
    world = Watched()
    pair = (PeerId("a"), PeerId("b"))
    world.fleet.links[pair] = LinkFact(0.02, 100e6)
    world.say(HOLD_S + 2, 0.0, 0.0, PathSeen("b", 0.02, 10e6))
    world.say(AGAIN_S - 2, 0.0, 0.0, PathSeen("b", 0.02, 0.0))
    assert world.probed == []
    world.say(3, 0.0, 0.0, PathSeen("b", 0.02, 0.0))
    assert world.probed == [pair]
