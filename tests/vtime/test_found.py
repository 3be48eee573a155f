"""What virtual time has found: each of these failed once."""

from dataclasses import replace

from helixd.ids import Epoch, NodeId
from helixd.layers import LayerRange
from helixd.model.safetensors_header import TensorRef
from helixd.plan.plan import Plan
from helixd.protocol.codec import from_frame, to_frame
from helixd.protocol.messages import (
    Activations,
    EpochPush,
    EpochState,
    Fetch,
    Fetched,
    Hello,
    NodeHardware,
    Part,
)
from helixd.protocol.versions import PROTOCOL_VERSION
from helixd.wire.link import Frame
from helixd.wire.memory_link import MemoryLink
from helixd.wire.peers import PeerIdentity
from tests.vtime.invariants import leaks, settle
from tests.vtime.loop import Process
from tests.vtime.model import ROW_BYTES, NoWeights
from tests.vtime.planner import plan_of
from tests.vtime.world import MACHINES, PORT, ProcessEndpoint, World, world


def test_a_worker_that_is_stopped_just_when_its_coordinator_is_lost_ends():
    with world(1) as w:
        daemon = w.start_worker("w0")
        w.start_worker("w1")
        w.advance(3)  # its probed links linger: the session's tasks do not end at once
        w.loop.do(lambda: w.network.kill(w.hub.endpoint))
        daemon.main.cancel()
        w.advance(5)
        assert daemon.main.cancelled()
        del w.workers["w0"]


def test_nothing_is_left_of_a_link_that_was_lost():
    with world(1) as w:
        w.start_worker("w0")
        w.start_worker("w1")
        w.advance(3)
        for _ in range(3):
            w.reset_link("w0", "hub")
            w.reset_link("w0", "w1")
            w.advance(15)
        for daemon in (w.hub, *w.workers.values()):
            senders = [task for task in daemon.process.tasks if task.get_name().startswith("send to")]
            assert len(senders) == len(daemon.endpoint.links)


def test_a_node_that_was_gone_when_its_plan_came_into_force_has_kv_room_when_it_is_back():
    with world(1) as w:
        for name in ("w1", "w2"):
            w.start_worker(name)
        w.wait_until(lambda: w.coordinator.epochs.coming is not None, 10, "no plan")
        w.stop("w2")
        w.advance(6)
        w.cont("w2")
        settle(w)


def test_a_node_that_is_lost_while_a_plan_is_made_stops_nobody_and_serves_when_it_is_back():
    with world(1) as w:
        for name in ("w1", "w2", "w4"):
            w.start_worker(name)
        w.advance(4)
        client = w.clients.ask(tuple(range(40)), 24)
        w.advance(0.02)
        plan = w.coordinator.epochs.active.plan
        lost = next(n for n in w.workers if not any(n in hop for hop in client.generation.route))
        w.kill_worker(lost)
        w.push(plan)
        w.advance(0.1)
        assert client.generation.retries == 0
        w.start_worker(lost)
        settle(w)


def test_a_plan_that_comes_before_a_new_worker_is_prepared_waits_for_it():
    with world(1) as w:
        w.start_worker("w1")
        w.start_worker("w2")
        w.advance(4)
        plan = w.coordinator.epochs.active.plan
        w.kill_worker("w1")
        w.start_worker("w1")
        w.wait_until(lambda: "w1" in w.coordinator.fleet.peers, 5, "it does not join", step_s=0.001)
        w.push(plan)  # made while the older life was there
        w.advance(0.05)
        settle(w)


def test_an_idle_node_does_not_keep_what_came_early():
    with world(1) as w:
        w.start_worker("w1")
        w.start_worker("w2")
        w.advance(4)
        (host,) = w.workers["w2"].worker.hosts.values()
        early = Activations(w.hub.endpoint.identity.incarnation, w.coordinator.epochs.active.epoch, host.setup.node,
                            [Part(99, 0, 5, 0, 4, sample=False)])  # fmt: skip
        w.loop.do(lambda: host.runtime.on_activations(early, memoryview(bytes(4 * ROW_BYTES))))
        assert leaks(w)
        w.advance(15)
        assert not leaks(w)


def test_an_epoch_that_is_retired_while_it_loads_is_not_served():
    with world(1) as w:
        w.start_worker("w1")
        w.start_worker("w2")
        w.advance(4)
        daemon = w.workers["w1"]
        (host,) = daemon.worker.hosts.values()
        others = LayerRange(3, 6) if host.held() == [(0, 3)] else LayerRange(0, 3)
        daemon.process.spawn(host.load(Epoch(50), others, 500, NoWeights(), lambda done, total: None), "load")
        w.advance(0.05)
        daemon.process.spawn(host.retire_below(Epoch(51)), "retire")
        w.advance(1)
        assert not host.runtime._live_epochs


def test_a_burst_that_does_not_fit_at_once_is_answered_whole_without_a_fault():
    with world(1) as w:
        for name in MACHINES:
            w.start_worker(name)
        w.advance(4)
        asked = [w.clients.ask(tuple(range(at, at + 48)), 59, seed=at) for at in range(8)]
        w.advance(0.1)
        asked += [w.clients.ask(tuple(range(at, at + 63)), 13, seed=at) for at in range(12)]
        w.wait_until(lambda: not w.clients.running, 60, "it takes too long")
        assert [client.outcome for client in asked] == ["finished"] * len(asked)
        assert w.coordinator.admission.preemptions > 0
        settle(w)


def test_a_sequence_that_grows_out_of_its_node_goes_on_where_there_is_room_in_whole_pages():
    with world(1) as w:
        for name in ("w0", "w1", "w4"):
            w.start_worker(name)
        w.advance(4)
        placement = {NodeId(n): LayerRange(*r) for n, r in {"w0": (0, 4), "w1": (4, 6), "w4": (0, 6)}.items()}
        w.push(plan_of(w.spec(), placement))
        w.advance(2)
        # w4 has room for 181 tokens in all six layers, which is two whole pages and not a third.
        asked = [w.clients.ask(tuple(range(at, at + 90)), 60, seed=at) for at in range(3)]
        w.wait_until(lambda: not w.clients.running, 90, "it takes too long")
        assert [client.outcome for client in asked] == ["finished"] * 3
        settle(w)


def test_a_placement_that_still_covers_all_layers_gets_the_hops_it_needs_when_others_leave():
    with world(1) as w:
        for name in ("w0", "w1", "w4"):
            w.start_worker(name)
        w.advance(4)
        placement = {NodeId("w1"): LayerRange(0, 3), NodeId("w0"): LayerRange(3, 6), NodeId("w4"): LayerRange(3, 6)}
        plan = plan_of(w.spec(), placement)
        only = {v: tuple(hop for hop in hops if hop.node != "w4") for v, hops in plan.schedule.items() if v != "w4"}
        w.push(replace(plan, schedule=only))
        w.advance(2)
        w.leave("w0")
        w.advance(2)
        w.forget_left()
        settle(w)


def test_a_link_that_is_lost_is_planned_around_with_the_placement_there_is():
    with world(1) as w:
        for name in ("w0", "w1", "w4"):
            w.start_worker(name)
        w.advance(4)
        placement = {NodeId("w1"): LayerRange(0, 3), NodeId("w0"): LayerRange(3, 6), NodeId("w4"): LayerRange(3, 6)}
        plan = plan_of(w.spec(), placement)
        only = {v: tuple(hop for hop in hops if hop.node != "w4") for v, hops in plan.schedule.items() if v != "w4"}
        w.push(replace(plan, schedule=only))
        w.advance(2)
        w.cut_off("w0", "w1")
        w.advance(8)
        client = w.clients.ask((1, 2, 3), 5)
        w.wait_until(lambda: client.outcome is not None, 10, "nothing goes around the link")
        assert client.outcome == "finished"
        settle(w)


def coming_to_w4(w: World) -> tuple[dict[NodeId, LayerRange], Plan]:
    """A chain serves, and w4 begins to load half of it; the placement that serves, and the plan to come."""
    for name in ("w0", "w2"):
        w.start_worker(name)
    w.advance(4)
    chain = {NodeId("w0"): LayerRange(0, 3), NodeId("w2"): LayerRange(3, 6)}
    w.push(plan_of(w.spec(), chain))
    w.advance(2)
    assert w.coordinator.epochs.active.plan.placement == chain
    w.start_worker("w4")
    c = w.coordinator
    w.wait_until(lambda: len(c.fleet.links) == 9 and c.prober.complete, 5, "no links", step_s=0.01)
    plan = plan_of(w.spec(), {NodeId("w0"): LayerRange(0, 3), NodeId("w4"): LayerRange(3, 6)})
    w.push(plan)
    return chain, plan


def test_a_plan_whose_new_node_dies_while_it_loads_does_not_take_the_place_of_one_that_serves():
    with world(1) as w:
        chain, plan = coming_to_w4(w)
        client = w.clients.ask((1, 2, 3), 60)
        w.advance(0.03)
        assert w.coordinator.epochs.coming.plan is plan
        w.kill_worker("w4")
        w.advance(0.05)
        assert w.coordinator.readiness().ready
        assert w.coordinator.epochs.active.plan.placement == chain
        w.wait_until(lambda: client.outcome is not None, 30, "the stream does not end")
        assert client.outcome == "finished"
        assert client.generation.retries == 0
        settle(w)


def test_a_plan_whose_new_node_cannot_load_does_not_take_the_place_of_one_that_serves():
    with world(1) as w:
        chain, plan = coming_to_w4(w)
        w.advance(0.03)
        epochs = w.coordinator.epochs
        assert epochs.coming.plan is plan
        failed = EpochState(epochs.coming.epoch, "w4", "failed", 0, 3, "out of memory")
        w.loop.do(lambda: epochs.on_state(failed))
        w.advance(0.1)
        assert epochs.active.plan.placement == chain
        assert w.coordinator.readiness().ready
        w.wrong[:] = [what for what in w.wrong if "node_failed" not in what]
        settle(w)


def test_a_plan_that_is_overtaken_while_it_loads_makes_room_for_the_next_one():
    with world(1) as w:
        for name in ("w1", "w2"):
            w.start_worker(name)
        w.wait_until(lambda: w.coordinator.epochs.coming is not None, 10, "no plan", step_s=0.01)
        first = w.coordinator.epochs.coming.plan
        w.advance(0.06)
        one, other = sorted(first.placement)
        w.push(plan_of(w.spec(), {one: first.placement[other], other: first.placement[one]}))
        hosts = [host for daemon in w.workers.values() for host in daemon.worker.hosts.values()]
        for _ in range(100):
            w.advance(0.01)
            # No more fit.
            assert all(len(host.engine.loaded) <= 3 for host in hosts)
        assert w.coordinator.epochs.active.plan.placement != first.placement
        settle(w)


def test_a_session_that_ends_as_soon_as_it_begins_is_not_begun_again_without_a_pause():
    with world(1) as w:
        w.start_worker("w0")
        w.advance(3)
        desk, joins = w.coordinator.desk, []
        welcome = desk._on_hello

        def welcome_and_hang_up(link: MemoryLink, hello: Hello, digests: bytes) -> None:
            welcome(link, hello, digests)
            joins.append(w.loop.time())
            w.loop.call_later(0.01, link.kill)

        desk._on_hello = welcome_and_hang_up
        w.reset_link("w0", "hub")
        w.advance(30)
        assert 5 <= len(joins) < 25
        desk._on_hello = welcome
        settle(w)


class Zeros:
    """A checkpoint of one large tensor."""

    def ref(self, name: str) -> TensorRef:
        return TensorRef("file", "float32", (1 << 22,), 0, 1 << 24)

    def read_range(self, name: str, offset: int, length: int) -> bytearray:
        return bytearray(length)


def test_weights_on_their_way_to_a_worker_hold_back_nothing_else_for_it():
    with world(1) as w:
        w.start_worker("w0")
        w.start_worker("w1")
        w.advance(4)
        heard, process = [], Process(w.loop, "fetcher")

        async def hear(link: object, frame: Frame) -> None:
            heard.append(from_frame(frame))

        endpoint = ProcessEndpoint(w.network, w._identity("fetcher"), process, lambda link: hear, lambda *what: None)

        async def live() -> None:
            async with endpoint:
                link = await endpoint.dial("hub", PORT, 5.0)
                hardware = [NodeHardware("fetcher", "cpu", "x", 1 << 20, 1 << 20)]
                await link.send(to_frame(Hello(PROTOCOL_VERSION, hardware, "", "fetcher", PORT, "x")))
                for at in range(4):
                    await link.send(to_frame(Fetch(at, "tensor", at << 20, 1 << 20)))
                await w.loop.create_future()

        w.coordinator.desk._weights._index = Zeros()
        process.spawn(live(), "fetcher")
        w.advance(0.5)
        w.push(w.coordinator.epochs.active.plan)
        w.advance(0.5)
        # A piece takes a second on this link.
        assert not any(isinstance(message, Fetched) for message in heard)
        assert any(isinstance(message, EpochPush) for message in heard)
        w.advance(8)
        assert [message.request for message in heard if isinstance(message, Fetched)] == list(range(4))
        w.loop.do(lambda: w.network.kill(endpoint))
        settle(w)


def test_layers_of_another_model_are_not_planned_with():
    """A coordinator may come back with other weights; its workers still hold the old ones."""
    with world(1) as w:
        for name in ("w0", "w1"):
            w.start_worker(name)
        w.advance(4)
        held = w.coordinator.epochs.holding()
        assert held
        w.restart_coordinator(0.0)
        joined = lambda: len(w.coordinator.fleet.peers) == 2  # noqa: E731
        w.wait_until(joined, 10, "they do not join again", step_s=0.01)
        assert w.coordinator.epochs.holding() == held
        served = w._served()
        w._served = lambda: replace(served, weights="others")
        w.restart_coordinator(0.0)
        w.wait_until(joined, 10, "they do not join again", step_s=0.01)
        assert w.coordinator.epochs.holding() == {}
        settle(w)


def test_a_coordinator_that_forgot_how_often_it_has_lived_is_not_taken_for_the_one_before():
    """Its state directory may be lost; workers remember what sequences of the one before are over."""
    with world(1) as w:
        for name in ("w0", "w1"):
            w.start_worker(name)
        w.advance(4)
        for seed in range(3):
            w.clients.ask((1, 2, 3), 4, seed=seed)
        w.wait_until(lambda: not w.clients.running, 10, "they do not end")
        identity = w.hub.endpoint.identity
        w._identity = lambda name: PeerIdentity(identity.peer, identity.incarnation)
        w.restart_coordinator(0.5)
        del w._identity
        w.advance(6)
        client = w.clients.ask((4, 5, 6), 4)
        w.wait_until(lambda: client.outcome is not None, 5, "its route leads nowhere")
        assert client.outcome == "finished"
        settle(w)


def test_a_worker_that_leaves_and_cannot_be_done_without_finishes_what_it_has():
    with world(1) as w:
        for name in ("w1", "w2"):
            w.start_worker(name)
        w.advance(4)
        client = w.clients.ask((1, 2, 3), 100)
        w.advance(0.5)
        w.leave("w1")
        w.wait_until(lambda: client.outcome is not None, 25, "it does not end")
        assert client.outcome == "finished"
        assert client.generation.retries == 0
        w.wait_until(lambda: w.workers["w1"].main.done(), 1, "it is not released")
        w.forget_left()
        settle(w)


def test_what_runs_on_a_leaving_worker_moves_as_soon_as_another_plan_serves():
    with world(1) as w:
        for name in ("w1", "w2"):
            w.start_worker(name)
        w.advance(4)
        client = w.clients.ask((1, 2, 3), 100)
        w.advance(0.5)
        w.leave("w1")
        w.start_worker("w4")
        w.wait_until(lambda: w.workers["w1"].main.done(), 12, "it is not released")
        assert client.outcome is None
        w.wait_until(lambda: client.outcome is not None, 25, "it does not end")
        assert client.outcome == "finished"
        assert client.generation.retries == 1
        w.forget_left()
        settle(w)
