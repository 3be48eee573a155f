"""What a client sees of each fault, with the configured timers as bounds: the scenarios of the real clusters' tests.

Silence is death after `WIRE.dead_after_s`, a route is waited for during `COORDINATOR.failover_wait_s`.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from helixd.errors import PeerLost
from helixd.ids import Incarnation, NodeId, PeerId
from helixd.layers import LayerRange
from helixd.wire.errors import PeerRefused
from helixd.wire.peers import PeerIdentity
from tests.vtime.clients import Client
from tests.vtime.invariants import leaks, settle
from tests.vtime.loop import Process
from tests.vtime.planner import plan_of
from tests.vtime.world import COORDINATOR, HUB, PORT, WIRE, ProcessEndpoint, World, world

DEAD_S = WIRE.dead_after_s
AGAIN_S = 3.0
"""More than the longest prompt of these tests takes to be computed again."""
FIT_ANYWHERE = 3
"""Sequences that the smallest node of `PAIRS` has KV room for: none has to wait for another's end."""
PAIRS = {"w0": (0, 3), "w1": (0, 3), "w2": (3, 6), "w4": (3, 6)}
CHAIN = {"w0": (0, 3), "w2": (3, 6)}


@contextmanager
def serving(ranges: dict[str, tuple[int, int]], seed: int = 1) -> Iterator[World]:
    """A cluster with this placement in force; at the end it is settled."""
    with world(seed) as w:
        for name in ranges:
            w.start_worker(name)
        w.advance(4)
        w.push(plan_of(w.spec(), {NodeId(name): LayerRange(*pair) for name, pair in ranges.items()}))
        w.advance(2)
        assert not w.coordinator.epochs.unready_nodes()
        yield w
        settle(w)


def streams(w: World, count: int = 8, tokens: int = 40) -> list[Client]:
    return [w.clients.ask(tuple(range(at, at + 12)), tokens, seed=at) for at in range(count)]


def finish(w: World, limit_s: float = 60.0) -> None:
    w.wait_until(lambda: not w.clients.running, limit_s, "it takes too long")


def through(client: Client, name: str) -> bool:
    assert client.generation is not None
    return any(hop.startswith(name) for hop in client.generation.route)


def loaded(w: World) -> dict[str, int]:
    return {name: host.weight_bytes_loaded for name, d in w.workers.items() for host in d.worker.hosts.values()}


@pytest.mark.parametrize("victim", sorted(PAIRS))
@pytest.mark.parametrize("after_s", [0.01, 0.2, 0.8, 1.7])
def test_a_killed_worker_is_a_pause_of_a_re_prefill(victim: str, after_s: float) -> None:
    with serving(PAIRS) as w:
        clients = streams(w, FIT_ANYWHERE)
        w.advance(after_s)
        w.kill_worker(victim)
        finish(w)
        assert {client.outcome for client in clients} == {"finished"}
        assert any(client.generation and client.generation.retries for client in clients)
        assert max(client.longest_gap_s for client in clients) < AGAIN_S


@pytest.mark.parametrize("victim", sorted(PAIRS))
def test_a_stopped_worker_is_left_behind_after_the_silence_and_taken_back(victim: str) -> None:
    with serving(PAIRS) as w:
        clients = streams(w)
        before = loaded(w)
        w.advance(0.5)
        w.stop(victim)
        finish(w)
        assert {client.outcome for client in clients} == {"finished"}
        assert DEAD_S <= max(client.longest_gap_s for client in clients) < DEAD_S + AGAIN_S
        w.advance(30)
        w.cont(victim)
        w.advance(10)
        assert victim in w.coordinator.fleet.peers
        assert loaded(w)[victim] == before[victim]


@pytest.mark.parametrize(("one", "other"), [("w0", HUB), ("w0", "w2"), ("w2", HUB)])
@pytest.mark.parametrize("both_ways", [True, False])
def test_a_partition_shorter_than_the_silence_breaks_nothing(one: str, other: str, both_ways: bool) -> None:
    with serving(CHAIN) as w:
        clients = streams(w, 3)
        w.advance(0.5)
        w.cut_off(one, other, both_ways=both_ways)
        w.advance(DEAD_S - 1.0)
        w.heal(one, other)
        finish(w)
        assert {client.outcome for client in clients} == {"finished"}
        assert w.coordinator.desk.failovers == 0
        assert all(client.generation and client.generation.retries == 0 for client in clients)


@pytest.mark.parametrize(("one", "other"), [("w0", "w2"), ("w2", "w0")])
@pytest.mark.parametrize("both_ways", [True, False])
def test_a_lost_link_is_driven_around_and_both_its_nodes_serve_on(one: str, other: str, both_ways: bool) -> None:
    with serving(PAIRS) as w:
        clients = streams(w)
        w.advance(0.5)
        w.cut_off(one, other, both_ways=both_ways)
        finish(w)
        assert {client.outcome for client in clients} == {"finished"}
        assert max(client.longest_gap_s for client in clients) < DEAD_S + AGAIN_S
        w.advance(DEAD_S)
        assert set(w.coordinator.fleet.peers) == set(PAIRS)
        later = streams(w)
        finish(w)
        assert {client.outcome for client in later} == {"finished"}
        assert all(client.generation and client.generation.retries == 0 for client in later)
        assert all(any(through(client, node) for client in later) for node in (one, other))


def test_a_worker_that_was_cut_off_is_back_soon_after_and_loads_nothing() -> None:
    with serving(PAIRS) as w:
        before = loaded(w)
        w.cut_off("w0", HUB)
        w.advance(30)
        assert "w0" not in w.coordinator.fleet.peers
        w.heal("w0", HUB)
        w.advance(10)
        assert "w0" in w.coordinator.fleet.peers
        assert not w.coordinator.epochs.unready_nodes()
        assert loaded(w) == before


def test_the_only_pipeline_that_comes_back_in_time_goes_on_where_it_was() -> None:
    with serving(CHAIN) as w:
        clients = streams(w, 3)
        w.advance(0.8)
        w.kill_worker("w2")
        w.advance(5)
        w.start_worker("w2")
        finish(w)
        assert {client.outcome for client in clients} == {"finished"}
        assert max(client.longest_gap_s for client in clients) < COORDINATOR.failover_wait_s


def test_the_only_pipeline_that_does_not_come_back_is_one_error_when_the_wait_is_over() -> None:
    with serving(CHAIN) as w:
        clients = streams(w, 3)
        w.advance(0.8)
        w.kill_worker("w2")
        killed_s = w.loop.time()
        finish(w)
        for client in clients:
            assert client.outcome == "failed: pipeline_lost"
            assert abs(client.ended_s - killed_s - COORDINATOR.failover_wait_s) < 2.0
        w.start_worker("w2")


def test_a_new_coordinator_serves_soon_with_what_the_workers_hold_and_they_forget_the_old_ones_requests() -> None:
    with serving(PAIRS) as w:
        clients = streams(w)
        before = loaded(w)
        w.advance(0.8)
        w.restart_coordinator(1.0)
        w.advance(1.0)
        assert not [leak for leak in leaks(w) if "KV" in leak or "open" in leak]
        w.wait_until(lambda: w.coordinator.readiness().ready, 5.0, "it is not ready")
        assert {client.outcome for client in clients} == {"lost with the coordinator"}
        assert loaded(w) == before
        later = streams(w)
        finish(w)
        assert {client.outcome for client in later} == {"finished"}


@pytest.mark.parametrize("seed", range(5))
def test_clients_that_leave_at_any_moment_free_everything_at_once(seed: int) -> None:
    with serving(PAIRS, seed) as w:
        clients = streams(w, 20)
        for client in clients:
            w.advance(w.loop.random.uniform(0, 0.1))
            w.clients.leave(client)
        w.advance(0.5)
        assert not leaks(w)
        assert {client.outcome for client in clients} <= {"left", "finished"}


def test_a_client_that_reads_slowly_slows_nobody_else() -> None:
    def lasted(read_delay_s: float) -> list[float]:
        with serving(PAIRS) as w:
            slow = w.clients.ask((1, 2, 3), 40, seed=99, read_delay_s=read_delay_s)
            others = streams(w, 4)
            w.wait_until(lambda: all(client.outcome for client in others), 30, "others wait for the slow one")
            assert (slow.outcome is None) == (read_delay_s > 0)
            finish(w, 90)
            assert slow.outcome == "finished"
            return [client.ended_s - client.asked_s for client in others]

    for with_it, without in zip(lasted(1.0), lasted(0.0), strict=True):
        assert with_it <= without * 1.05


def test_a_second_daemon_of_the_same_name_and_life_is_refused_and_the_first_serves_on() -> None:
    with serving(CHAIN) as w:
        first = w.workers["w0"].endpoint.identity
        clone = PeerIdentity(PeerId("w0"), first.incarnation, b"another process!")
        ghost = PeerIdentity(PeerId("w0"), Incarnation(first.incarnation - 1), b"an older process")
        for identity in (clone, ghost):
            process = Process(w.loop, "clone")

            async def ignore(link: object, frame: object) -> None: ...

            endpoint = ProcessEndpoint(w.network, identity, process, lambda link: ignore, lambda *what: None)

            async def dial(endpoint: ProcessEndpoint = endpoint) -> None:
                async with endpoint:
                    await endpoint.dial(HUB, PORT, 5.0)

            with pytest.raises(PeerRefused) as refused:
                w.loop.run_until_complete(process.spawn(dial(), "clone"))
            assert not isinstance(refused.value, PeerLost)
        clients = streams(w, 3)
        finish(w)
        assert {client.outcome for client in clients} == {"finished"}
