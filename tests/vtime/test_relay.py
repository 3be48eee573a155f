"""Workers that cannot reach each other: planned around where that is possible, relayed by the coordinator where not."""

import pytest

from helixd.ids import NodeId, PeerId
from helixd.layers import LayerRange
from tests.vtime.clients import Client
from tests.vtime.invariants import settle
from tests.vtime.planner import plan_of
from tests.vtime.test_scenarios import CHAIN, finish, streams
from tests.vtime.world import COORDINATOR, WIRE, World, world

PROBED_S = 2 * COORDINATOR.probe_timeout_s + 5.0
"""Both ways of a pair that does not answer, one after the other, and planning."""
REACHED_S = 90.0
"""The longest that two workers are not asked again whether they reach each other, and planning."""
APART = frozenset((PeerId("w0"), PeerId("w2")))


def alone(w: World, *names: str) -> None:
    """These join and never reach one another."""
    for name in names:
        w.start_worker(name)
    for one in names:
        for other in names:
            if one < other:
                w.cut_off(one, other)


def served(w: World, clients: list[Client]) -> None:
    finish(w)
    assert {client.outcome for client in clients} == {"finished"}


def relayed(w: World) -> frozenset[frozenset[PeerId]]:
    active = w.coordinator.epochs.active
    assert active is not None
    return active.relayed


def test_two_that_only_reach_the_coordinator_serve_through_it_exactly_and_it_says_so() -> None:
    with world(1) as w:
        alone(w, "w0", "w2")
        w.wait_until(lambda: w.coordinator.readiness().ready, PROBED_S, "it does not serve")
        assert relayed(w) == {APART}
        clients = streams(w, 3)
        served(w, clients)
        assert all(client.generation and client.generation.retries == 0 for client in clients)
        assert w.coordinator.relay.carried_bytes > 0
        assert w.coordinator.relay.dropped_frames == 0
        view = w.coordinator.cluster_view()
        assert view["plan"]["relayed"] == [["w0", "w2"]]  # type: ignore[index]
        shown = {(link["src"], link["dst"]): link for link in view["links"]}  # type: ignore[attr-defined]
        assert shown["w0", "w2"]["relayed"]
        assert shown["w0", "w2"]["error"]
        assert not shown["coordinator", "w0"]["relayed"]
        assert any(str(node["note"]).startswith("relayed: ") for node in view["nodes"])  # type: ignore[attr-defined]
        settle(w)


def test_once_they_reach_each_other_nothing_is_relayed_any_more_and_nothing_is_loaded() -> None:
    with world(2) as w:
        alone(w, "w0", "w2")
        w.wait_until(lambda: w.coordinator.readiness().ready, PROBED_S, "it does not serve")
        clients = streams(w, 3, 100)
        w.heal("w0", "w2")
        loads = [host.weight_bytes_loaded for d in w.workers.values() for host in d.worker.hosts.values()]
        w.wait_until(lambda: not relayed(w), REACHED_S, "it is relayed for ever")
        served(w, clients)
        before = w.coordinator.relay.carried_frames
        served(w, streams(w, 3))
        assert w.coordinator.relay.carried_frames == before
        assert loads == [host.weight_bytes_loaded for d in w.workers.values() for host in d.worker.hosts.values()]
        settle(w)


def test_a_pair_that_others_connect_is_planned_around() -> None:
    """w4 could hold all layers; w0 and w2 cannot reach each other."""
    with world(3) as w:
        alone(w, "w0", "w2")
        w.start_worker("w4")
        w.wait_until(lambda: w.coordinator.readiness().ready, PROBED_S, "it does not serve")
        served(w, streams(w, 3))
        assert not relayed(w)
        assert w.coordinator.relay.carried_frames == 0
        settle(w)


def test_a_link_that_is_lost_later_is_relayed_if_it_is_the_only_one() -> None:
    with world(4) as w:
        for name in CHAIN:
            w.start_worker(name)
        w.advance(4)
        w.push(plan_of(w.spec(), {NodeId(name): LayerRange(*pair) for name, pair in CHAIN.items()}))
        w.advance(2)
        assert not relayed(w)
        clients = streams(w, 3, 60)
        w.advance(0.8)
        w.cut_off("w0", "w2")
        served(w, clients)
        assert relayed(w) == {APART}
        assert max(client.longest_gap_s for client in clients) < WIRE.dead_after_s + 10.0
        settle(w)


@pytest.mark.parametrize("victim", ["w0", "w2"])
def test_a_relayed_worker_that_dies_is_a_pause_like_any_other(victim: str) -> None:
    with world(5) as w:
        alone(w, "w0", "w2")
        w.wait_until(lambda: w.coordinator.readiness().ready, PROBED_S, "it does not serve")
        clients = streams(w, 3, 60)
        w.advance(0.7)
        w.kill_worker(victim)
        w.advance(1.0)
        w.start_worker(victim)
        served(w, clients)
        settle(w)


def test_a_worker_of_the_version_before_is_not_relayed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("helixd.worker.worker.PROTOCOL_VERSION", 1)
    with world(6) as w:
        alone(w, "w0", "w2")
        w.advance(PROBED_S)
        ready = w.coordinator.readiness()
        assert not ready.ready
        assert ready.code == "no_feasible_placement"
        assert w.coordinator.epochs.active is None


def test_who_stops_holds_only_its_own_rows_up() -> None:
    """Three in a row, each relayed; the one that stops is dead after its silence, the others' links stay."""
    with world(7) as w:
        alone(w, "w0", "w2", "w3")
        w.wait_until(lambda: w.coordinator.readiness().ready, 3 * PROBED_S, "it does not serve")
        clients = streams(w, 3, 40)
        w.advance(0.5)
        w.stop("w2")
        w.advance(WIRE.dead_after_s + 1.0)
        assert set(w.coordinator.fleet.peers) == {"w0", "w3"}
        served(w, clients)
        w.cont("w2")
        settle(w)
