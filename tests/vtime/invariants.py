"""What must hold in a virtual cluster: at every moment (`check`), and some time after the last fault (`settle`).

Numbers in brackets are those of the failure model's invariants. I1, every stream is a prefix of the reference and ends
equal to it, is checked by the clients as events come; I4 and I5, nothing grows, is seen here as tasks and books.
"""

from collections import Counter

from tests.vtime.clients import Client
from tests.vtime.world import MACHINES, NUM_LAYERS, World

PATIENCE_S = 150.0
"""The longest that anything may last once nothing is broken any more: held for a pipeline, retried, read slowly."""
BOOKS_S = 15.0
QUIET_S = 60.0


def check(world: World) -> None:
    """What holds at every moment."""
    assert not world.wrong, "\n".join(world.wrong)
    assert not world.loop.failures, "\n".join(world.loop.failures)
    for name, daemon in world.workers.items():
        if daemon.main.done() and not daemon.leaving:
            error = None if daemon.main.cancelled() else daemon.main.exception()
            raise AssertionError(f"{name} ended by itself: {error!r}")
    assert not world.hub.main.done(), f"the coordinator ended by itself: {world.hub.main}"
    coordinator = world.coordinator
    # [I8] An epoch only rises, over restarts too.
    if coordinator.epochs.active is not None:
        active = coordinator.epochs.active.epoch
        assert world.highest_active <= active <= world.last_epoch
        world.highest_active = active
    _check_ledger(world)
    for lease in coordinator.admission.leases():
        run = coordinator.admission.holder(lease.sequence)
        assert run is not None
        assert run.lease is lease, f"sequence {lease.sequence} holds a route that it does not know of"


def _check_ledger(world: World) -> None:
    ledger = world.coordinator.admission.ledger
    for node, held in ledger._held.items():
        assert ledger.used(node) == sum(each.layers * each.tokens for each in held.values())
    assert ledger.total_used() == sum(ledger.used(node) for node in ledger._held)


def settle(world: World) -> None:
    """Undo every fault, wait, and look whether all is as if there had been none."""
    for name in list(world.workers):
        world.cont(name)
    world.cut.clear()
    world._apply_cuts()
    world.note("settle")
    _wait_for_leavers(world)
    world.wait_until(lambda: not world.clients.running, PATIENCE_S, f"still running: {_running(world)}", 0.5)
    _wait_for_steadiness(world)
    _wait_for_empty_books(world)
    _ask_again(world)
    _wait_for_empty_books(world)
    world.advance(40.0)  # what lingers ends, what was asked for again is answered
    assert not leaks(world)
    _check_tasks(world)
    check(world)
    for client in world.clients.all:
        judge(client)


def _wait_for_leavers(world: World) -> None:
    def left() -> bool:
        return all(daemon.main.done() for daemon in world.workers.values() if daemon.leaving)

    world.wait_until(left, PATIENCE_S, "a worker does not get to leave")
    world.forget_left()


def _wait_for_empty_books(world: World) -> None:
    began_s = world.loop.time()
    while (found := leaks(world)) and world.loop.time() - began_s < BOOKS_S:
        world.advance(0.5)
    assert not found, "\n".join(found)


def _running(world: World) -> list[str]:
    return [f"{c.request.request_id} {c.tokens} asked {c.asked_s:.1f}" for c in world.clients.running]


def _wait_for_steadiness(world: World) -> None:
    """[I8] Everybody has joined, every link is known and usable, everybody serves the active epoch."""

    def unsteady() -> str:
        c = world.coordinator
        nodes = {node for name in world.workers for node, _ in MACHINES[name]}
        if set(c.fleet.nodes) != nodes:
            return f"in the fleet are {sorted(c.fleet.nodes)}, alive are {sorted(nodes)}"
        if any(node.measured is None for node in c.fleet.nodes.values()):
            return "a node is not measured"
        if not c.prober.complete or any(fact.error for fact in c.fleet.links.values()):
            return f"links are not known or not usable: {c.fleet.links}"
        if can_serve(world):
            if c.epochs.coming is not None:
                return f"epoch {c.epochs.coming.epoch} comes for ever: {c.epochs.coming.states}"
            if not c.readiness().ready:
                return f"not ready: {c.readiness()}"
            if c.epochs.active is not None and c.epochs.active.relayed:
                return f"relayed for ever: {c.epochs.active.relayed}"
            if unready := c.epochs.unready_nodes() & nodes:
                return f"nodes of epoch {c.epochs.active and c.epochs.active.epoch} are not ready: {sorted(unready)}"
        return ""

    began_s = world.loop.time()
    while (why := unsteady()) and world.loop.time() - began_s < QUIET_S:
        world.advance(0.5)
    assert not why, f"{QUIET_S} s after the last fault: {why}"


def can_serve(world: World) -> bool:
    """Whether the nodes that are alive have room for all layers."""
    return sum(layers for name in world.workers for _, layers in MACHINES[name]) >= NUM_LAYERS


def leaks(world: World) -> list[str]:
    """[I2, I3] What is still held although nothing runs."""
    c = world.coordinator
    found = []
    if c.admission.running or c.admission.waiting:
        found.append(f"{c.admission.running} sequences run, {c.admission.waiting} wait")
    if c.admission.ledger.total_used():
        found.append(f"the ledger has { ({n: c.admission.ledger.holders(n) for n in c.admission.ledger._held}) }")
    if c._requests:
        found.append(f"requests: {c._requests}")
    for daemon in world.workers.values():
        for node, host in daemon.worker.hosts.items():
            runtime = host.runtime
            if runtime is None:
                continue
            if host.engine.kv_pages_used:
                found.append(f"{node}: {host.engine.kv_pages_used} KV pages are in use")
            if runtime.open_sequences or runtime.queued_tokens:
                found.append(f"{node}: {runtime.open_sequences} sequences open, {runtime.queued_tokens} tokens queued")
            if host.engine.sequences:  # type: ignore[attr-defined]
                found.append(f"{node}: the engine has {list(host.engine.sequences)}")  # type: ignore[attr-defined]
            if runtime._book._early_bytes:
                found.append(f"{node}: {runtime._book._early_bytes} bytes came early and are kept")
            active = c.epochs.active if c.epochs.coming is None else None
            if active is None or node not in active.plan.placement:
                continue
            if set(runtime._live_epochs) != {active.epoch}:
                found.append(f"{node} serves epochs {sorted(runtime._live_epochs)}, in force is {active.epoch}")
    return found


def _ask_again(world: World) -> None:
    """A cluster that has settled serves."""
    if not can_serve(world):
        return
    last = [world.clients.ask(tuple(range(5 + 7 * at)), 6, seed=at) for at in range(3)]
    world.wait_until(lambda: all(client.outcome for client in last), 30.0, "a settled cluster does not answer")
    for client in last:
        assert client.outcome == "finished", f"{client.outcome}: {client.failure or client.refusal}"


def _check_tasks(world: World) -> None:
    """[I4, I5] Nothing is left of what is over."""
    for daemon in [world.hub, *world.workers.values()]:
        names = Counter(task.get_name().split(" ")[0] for task in daemon.process.tasks)
        links = len(daemon.endpoint.links)
        assert names["send"] == links, f"{daemon.process.name} has {links} links and {names['send']} senders"
        assert names["memory"] == 3 * links, f"{daemon.process.name} has {links} links and {names['memory']} link tasks"
        for kind in ("request", "sequence", "first", "epoch", "load", "retire", "dial", "client", "welcome"):
            assert not names[kind], f"{daemon.process.name}: {[t.get_name() for t in daemon.process.tasks]}"


def judge(client: Client) -> None:
    """[I6, I7] Every request has one end, and an end that somebody or something is to blame for."""
    request, who = client.request, client.request.request_id
    assert client.outcome is not None, f"{who} has no end"
    lasted_s = client.ended_s - client.asked_s
    disturbed = client.faults_after > client.faults_before or client.asked_s < client.last_fault_s + QUIET_S
    match client.outcome:
        case "failed: timeout":
            assert request.deadline_s is not None
            assert lasted_s >= request.deadline_s - 1e-6
        case "failed: pipeline_lost":
            assert disturbed, f"{who} failed although nothing was wrong: {client.failure}"
            assert client.failure is not None
            if "broke" in client.failure.message:
                faults = client.faults_after - client.faults_before
                assert faults >= 3, f"{who} broke more often than there were faults ({faults}): {client.failure}"
        case "refused":
            assert client.refusal is not None
            assert client.refusal.status in (400, 429, 503), client.refusal
        case "finished" | "left" | "lost with the coordinator":
            pass
        case other:
            raise AssertionError(f"{who} ended as {other}: {client.failure}")
    if request.deadline_s is not None and client.outcome == "finished" and not client.read_delay_s:
        assert lasted_s <= request.deadline_s + 1.0
