"""Which device hangs when a sequence waited in vain."""

from typing import Any

import pytest

from helixd.coordinator.fleet import Fleet, Peer
from helixd.ids import Incarnation, NodeId, PeerId
from helixd.protocol import messages as m
from helixd.protocol import versions

NODES = [NodeId("a"), NodeId("b")]


def fleet() -> Fleet:
    made, nothing = Fleet(), object()
    anything: Any = nothing
    for node in NODES:
        hello = m.Hello(versions.PROTOCOL_VERSION, [m.NodeHardware(node, "cpu", "x", 1, 1)], "", "", 1, "test")
        assert not made.add(Peer(PeerId(node), Incarnation(1), anything, anything, "host", 1, hello))
    return made


def says(node: str, oldest_work_age_s: float, steps_done: int = 7) -> m.NodeStatus:
    return m.NodeStatus(node, steps_done, oldest_work_age_s, 0, 1, 0, 0, 0, 0, 0.0, 0, 0)


@pytest.mark.parametrize(
    ("said_s", "ago_s", "hangs"),
    [
        (60.0, 0.5, True),
        (45.0, 0.0, True),
        (44.9, 0.0, False),
        (15.0, 30.0, True),
        (14.9, 60.0, False),
        (0.0, 60.0, False),
    ],
)
def test_who_has_work_as_old_as_the_wait_hangs(said_s: float, ago_s: float, hangs: bool) -> None:
    made = fleet()
    made.heard(says("a", 0.01), 100.0 - ago_s)
    made.heard(says("b", said_s), 100.0 - ago_s)
    assert made.suspect(NODES, 60.0, 100.0) == (["b"] if hangs else [])
    assert made.unusable_nodes() == ({"b"} if hangs else frozenset())
    assert made.suspect(NODES, 60.0, 100.0) == [], "it is found out once"


def test_who_never_said_how_it_is_is_not_blamed() -> None:
    made = fleet()
    assert made.suspect([*NODES, NodeId("gone")], 60.0, 100.0) == []


@pytest.mark.parametrize(
    ("status", "works"), [(says("b", 70.0), False), (says("b", 70.0, 8), True), (says("b", 0.0), True)]
)
def test_a_step_that_is_done_or_work_that_was_taken_away_ends_the_suspicion(status: m.NodeStatus, works: bool) -> None:
    made = fleet()
    made.heard(says("b", 60.0), 99.0)
    assert made.suspect(NODES, 60.0, 100.0) == ["b"]
    assert made.heard(status, 101.0) is works
    assert made.unusable_nodes() == (frozenset() if works else {"b"})
    assert not made.heard(says("b", 0.5, 9), 102.0) or not works
