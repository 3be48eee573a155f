"""A cluster in virtual time: a coordinator and workers as processes that are killed, stopped, cut off and restarted.

Everything of helixd is real but the threads, the clock, the planner and the model. Faults are methods; what must
hold at every moment is in `check`, what must hold once faults are over in `settle` (`tests.vtime.invariants`).
"""

import asyncio
import json
import logging
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

from helixd.coordinator.coordinator import Coordinator, CoordinatorOptions, ServedModel
from helixd.coordinator.drift import DriftOptions
from helixd.coordinator.planning import ModelSizes, PlanningOptions, build_spec
from helixd.coordinator.replanning import ReplanOptions
from helixd.ids import Epoch, Incarnation, NodeId, PeerId
from helixd.layers import LayerRange
from helixd.model.sizes import embedding_bytes, head_bytes
from helixd.plan.cluster.spec import ClusterSpec, WorkloadSpec
from helixd.plan.plan import Plan
from helixd.wire.link import Link
from helixd.wire.memory import MemoryEndpoint, MemoryNetwork
from helixd.wire.memory_link import LinkConditions, MemoryLink
from helixd.wire.options import WireOptions
from helixd.wire.peers import PeerIdentity
from helixd.worker.backend import NodeSetup
from helixd.worker.worker import Worker, WorkerOptions
from tests.vtime.clients import Clients
from tests.vtime.loop import Process, VirtualLoop, running
from tests.vtime.model import HashBackend, decoder, raw_config
from tests.vtime.planner import quick_plan, what_is_left

NUM_LAYERS = 6
HUB = PeerId("hub")
PORT = 1
PLANNING_S = 0.2
SLOW_AFTER_EVENTS = 8

WIRE = WireOptions(small_payload_bytes=32, chunk_bytes=1024, small_window_bytes=8192, bulk_window_bytes=65536)
LINKS = LinkConditions(latency_s=0.001, bandwidth_bytes_per_s=1e6)
COORDINATOR = CoordinatorOptions(
    max_batch_sequences=4, max_batch_tokens=24, prefill_chunk_tokens=16, step_s=8.0, failover_wait_s=20.0,
    probe_bytes=64 << 10, probe_timeout_s=10.0,
    planning=PlanningOptions(workload=WorkloadSpec(mean_output_tokens=4.0, min_kv_tokens=128.0)),
    replan=ReplanOptions(settle_s=0.3, cooldown_s=5.0), drift=DriftOptions(hold_s=30.0),
)  # fmt: skip

MACHINES: Mapping[str, tuple[tuple[str, int], ...]] = {
    "w0": (("w0", 4),),
    "w1": (("w1", 3),),
    "w2": (("w2", 3),),
    "w3": (("w3a", 2), ("w3b", 2)),
    "w4": (("w4", 6),),
}
"""Machines and their nodes, each with the layers that fit."""


class ProcessEndpoint(MemoryEndpoint):
    """An endpoint whose links' tasks belong to its process, whoever made the link."""

    def __init__(self, network: MemoryNetwork, identity: PeerIdentity, process: Process, on_link: Any, on_lost: Any):
        def link_up(link: Link) -> Any:
            return process.context().run(on_link, link)

        def link_lost(link: Link, reason: str) -> None:
            if not process.dead:
                process.context().run(on_lost, link, reason)

        super().__init__(network, identity, WIRE, lambda *_: None, link_up, link_lost)
        self._process = process

    def spawn(self, work: Any, name: str) -> asyncio.Task[None]:
        # The group's callback too: whoever makes the link may be stopped when the task ends.
        return self._process.context().run(lambda: self._tasks.create_task(work, name=name))


@dataclass(slots=True)
class Daemon:
    """A life of a daemon."""

    process: Process
    endpoint: ProcessEndpoint
    main: asyncio.Task[None]


@dataclass(slots=True)
class WorkerDaemon(Daemon):
    worker: Worker
    leaving: bool = False


@dataclass(slots=True)
class HubDaemon(Daemon):
    coordinator: Coordinator


@dataclass(slots=True)
class Faults:
    """What was done to the cluster: `count` of it, and since when nothing more is broken."""

    count: int = 0
    last_s: float = 0.0
    log: list[tuple[float, str]] = field(default_factory=list)


class World:
    """Use `world(seed)`. Its methods are called from outside the loop; each lets the loop run as far as it must."""

    def __init__(self, loop: VirtualLoop) -> None:
        self.loop = loop
        self.network = MemoryNetwork(LINKS)
        self.workers: dict[str, WorkerDaemon] = {}
        self.wrong: list[str] = []
        self.faults = Faults()
        self.cut: set[tuple[str, str]] = set()
        self.last_epoch = Epoch(0)
        self.highest_active = Epoch(0)
        self.clients = Clients(self)
        self.weights_loaded: dict[str, int] = {}
        self.slowdown: dict[str, float] = {}
        self._lives = 0
        self._config = decoder(NUM_LAYERS)
        self._sizes = ModelSizes.of(self._config, "float32")
        self.hub: HubDaemon = self._start_hub()

    # -- life and death ----------------------------------------------------------------------------------------------

    @property
    def coordinator(self) -> Coordinator:
        return self.hub.coordinator

    def start_worker(self, name: str) -> WorkerDaemon:
        """Join, or join again as a new life."""
        assert name not in self.workers
        self._did(f"start {name}", disturbs=False)
        process, identity = self._process(name), self._identity(name)
        parts: list[Worker] = []
        endpoint = ProcessEndpoint(
            self.network, identity, process, lambda link: parts[0].on_link(link), lambda *what: parts[0].on_lost(*what)
        )

        async def connect() -> Link:
            return await endpoint.dial(HUB, PORT, 5.0, HUB)

        setups = [self._setup(node, layers) for node, layers in MACHINES[name]]
        options = WorkerOptions(advertise=name, port=PORT, status_interval_s=2.0)
        backend = HashBackend(self.loop, self.complain, self.slowdown)
        worker = process.context().run(Worker, endpoint, connect, setups, options, backend)
        parts.append(worker)

        async def live() -> None:
            async with endpoint:
                await endpoint.listen(name, PORT)
                await worker.run()

        daemon = WorkerDaemon(process, endpoint, self._main(process, live()), worker)
        self.workers[name] = daemon
        self._apply_cuts()
        return daemon

    def kill_worker(self, name: str) -> None:
        """SIGKILL."""
        self._did(f"kill {name}")
        self._kill(self.workers.pop(name))
        self._apply_cuts()

    def leave(self, name: str) -> None:
        """SIGTERM: it asks to be released, then goes. Stopped ones get the signal when they go on."""
        daemon = self.workers[name]
        if daemon.leaving:
            return
        self._did(f"leave {name}")
        daemon.leaving = True

        async def drain() -> None:
            await daemon.worker.leave("leaving", 30.0)
            daemon.main.cancel()

        daemon.process.spawn(drain(), "drain")

    def forget_left(self) -> None:
        """Workers that have left are no more."""
        for name, daemon in list(self.workers.items()):
            if daemon.leaving and daemon.main.done():
                self._kill(self.workers.pop(name))

    def restart_coordinator(self, after_s: float) -> None:
        """SIGKILL, and a new life `after_s` later. Streams of the old life are gone with its sockets."""
        self._did("restart coordinator")
        self._kill(self.hub)
        self.clients.coordinator_died()
        self.loop.advance(after_s)
        self.hub = self._start_hub()
        self._apply_cuts()

    def stop(self, name: str) -> None:
        """SIGSTOP."""
        if not self.workers[name].process.stopped:
            self._did(f"stop {name}")
            self.workers[name].process.stop()
            self._apply_cuts()

    def cont(self, name: str) -> None:
        """SIGCONT."""
        if self.workers[name].process.stopped:
            self._did(f"cont {name}")
            self.workers[name].process.cont()
            self._apply_cuts()

    def slow(self, node: str, factor: float) -> None:
        """The node takes so many times longer than it was measured to."""
        self._did(f"slow {node} {factor}", disturbs=False)
        self.slowdown[node] = factor

    # -- the network -------------------------------------------------------------------------------------------------

    def cut_off(self, one: str, other: str, *, both_ways: bool = True) -> None:
        """Hold back everything from `one` to `other` (and back) until `heal`."""
        self._did(f"cut {one} {'<->' if both_ways else '->'} {other}")
        self.cut |= {(one, other), (other, one)} if both_ways else {(one, other)}
        self._apply_cuts()

    def heal(self, one: str, other: str) -> None:
        self._did(f"heal {one} {other}", disturbs=(one, other) in self.cut or (other, one) in self.cut)
        self.cut -= {(one, other), (other, one)}
        self._apply_cuts()

    def reset_link(self, one: str, other: str) -> None:
        """Both ends find their connection closed."""
        link = self._daemon(one).endpoint.links.get(PeerId(other))
        if isinstance(link, MemoryLink):
            self._did(f"reset {one} - {other}")
            self.loop.do(link.kill)

    def names(self) -> list[str]:
        """Peers that are alive, the coordinator first."""
        return [HUB, *self.workers]

    # -- plans -------------------------------------------------------------------------------------------------------

    def spec(self) -> ClusterSpec:
        """The cluster as the coordinator would plan it now."""
        c = self.coordinator
        return build_spec(c.fleet, c.model.name, c.sizes, COORDINATOR.planning, c.epochs.holding())

    def push(self, plan: Plan) -> None:
        """Let the coordinator switch to this plan."""
        self._did(f"push { ({n: str(r) for n, r in plan.placement.items()}) }")
        self.loop.do(lambda: self.hub.process.context().run(self.coordinator.epochs.push, plan))

    # -- time --------------------------------------------------------------------------------------------------------

    def advance(self, seconds: float) -> None:
        self.loop.advance(seconds)

    def wait_until(self, condition: Callable[[], bool], limit_s: float, what: str, step_s: float = 0.1) -> None:
        """Let time pass until `condition`; complains after `limit_s`."""
        began_s = self.loop.time()
        while not condition():
            assert self.loop.time() - began_s < limit_s, f"after {limit_s} s: {what}"
            self.loop.advance(step_s)

    def complain(self, what: str) -> None:
        self.wrong.append(f"{self.loop.time():.4f} {what}")

    def close(self) -> None:
        self.clients.coordinator_died()
        for daemon in [*self.workers.values(), self.hub]:
            self._kill(daemon)
        self.workers.clear()

    # -- helpers -----------------------------------------------------------------------------------------------------

    def note(self, what: str) -> None:
        self.faults.log.append((round(self.loop.time(), 4), what))

    def _did(self, what: str, *, disturbs: bool = True) -> None:
        self.note(what)
        if disturbs:
            self.faults.count += 1
            self.faults.last_s = self.loop.time()

    def _daemon(self, name: str) -> Daemon:
        return self.hub if name == HUB else self.workers[name]

    def _process(self, name: str) -> Process:
        self._lives += 1
        return Process(self.loop, f"{name}#{self._lives}")

    def _identity(self, name: str) -> PeerIdentity:
        return PeerIdentity(PeerId(name), Incarnation(self._lives), self._lives.to_bytes(16, "big"))

    def _setup(self, node: str, layers: int) -> NodeSetup:
        # With as many layers as it may hold, a node's KV room is a bit less than a third of its memory.
        ends = embedding_bytes(self._config, "float32") + head_bytes(self._config, "float32")
        budget = int(layers * self._sizes.layer_bytes / 0.69) + ends
        return NodeSetup(NodeId(node), "cpu", "virtual", budget, budget, 1)

    def _main(self, process: Process, work: Any) -> asyncio.Task[None]:
        return process.spawn(work, f"{process.name} main")

    def _start_hub(self) -> HubDaemon:
        process, identity = self._process(HUB), self._identity(HUB)
        parts: list[Coordinator] = []
        endpoint = ProcessEndpoint(
            self.network, identity, process, lambda link: parts[0].on_link(link), lambda *what: parts[0].on_lost(*what)
        )

        async def live() -> None:
            async with asyncio.TaskGroup() as tasks, endpoint:
                coordinator = Coordinator(tasks, endpoint, self._served(), COORDINATOR, self.last_epoch, self._remember)
                parts.append(coordinator)
                await endpoint.listen(HUB, PORT)
                coordinator.start()
                await asyncio.Event().wait()

        main = self._main(process, live())
        while not parts:
            self.loop.advance(0)
        return HubDaemon(process, endpoint, main, parts[0])

    def _remember(self, epoch: Epoch) -> None:
        if epoch <= self.last_epoch:
            self.complain(f"epoch {epoch} comes after {self.last_epoch}")
        self.last_epoch = epoch

    def _served(self) -> ServedModel:
        return ServedModel(
            "hashes", "f" * 16, self._config, json.dumps(raw_config(NUM_LAYERS)), "float32", 160, (), None,
            lambda prompt: Letters(),
        )  # fmt: skip

    def _kill(self, daemon: Daemon) -> None:
        daemon.process.cont()
        self.loop.do(lambda: (self.network.kill(daemon.endpoint), daemon.main.cancel()))
        self.loop.run_until_complete(asyncio.wait({daemon.main}, timeout=60.0))
        if not daemon.main.done():
            self.complain(f"{daemon.process.name} does not end: {[t.get_name() for t in daemon.process.tasks]}")
        elif not daemon.main.cancelled() and (error := daemon.main.exception()) is not None:
            self.complain(f"{daemon.process.name} ended with {''.join(traceback.format_exception(error))}")
        daemon.process.dead = True

    def _apply_cuts(self) -> None:
        """What a stopped process is sent waits as well as what is cut off."""
        stopped = {name for name, daemon in self.workers.items() if daemon.process.stopped}
        names = [HUB, *MACHINES]
        for source in names:
            for target in names:
                if source == target:
                    continue
                way = self.network.way(PeerId(source), PeerId(target))
                held = (source, target) in self.cut or source in stopped or target in stopped
                if held and not way.held:
                    way.hold()
                elif way.held and not held:
                    way.release()


class Letters:
    """A detokenizer whose text names every id."""

    def feed(self, token_id: int) -> str:
        return f"<{token_id}>"

    def flush(self) -> str:
        return ""


class _Watch(logging.Handler):
    """Errors in the log are failures; with `history` every event is kept."""

    def __init__(self, world: World, history: list[str] | None) -> None:
        super().__init__(logging.ERROR if history is None else logging.INFO)
        self._world = world
        self._history = history

    def emit(self, record: logging.LogRecord) -> None:
        fields = getattr(record, "helixd_fields", {})
        text = (
            f"{record.getMessage()} {fields} {record.exc_info[1]!r}"
            if record.exc_info
            else f"{record.getMessage()} {fields}"
        )
        if record.levelno >= logging.ERROR:
            self._world.complain(f"logged: {text}")
        if self._history is not None:
            self._history.append(f"{self._world.loop.time():.4f} {text}")


@contextmanager
def world(seed: int, history: list[str] | None = None) -> Iterator[World]:
    """A world with a coordinator and no worker. `history` collects every log event."""
    with ExitStack() as stack:
        loop = stack.enter_context(running(seed))

        async def planner(
            spec: ClusterSpec, _: object, in_force: Mapping[NodeId, LayerRange] | None = None
        ) -> tuple[Plan, Plan | None]:
            await asyncio.sleep(PLANNING_S)
            return quick_plan(spec), None if in_force is None else what_is_left(spec, in_force)

        stack.enter_context(patch("helixd.coordinator.replanning.run_planner", planner))
        stack.enter_context(patch("helixd.coordinator.request.EVENT_QUEUE", SLOW_AFTER_EVENTS))
        stack.enter_context(patch("helixd.worker.worker.random.uniform", loop.random.uniform))
        made = World(loop)
        log = logging.getLogger("helixd")
        watch, level = _Watch(made, history), log.level
        log.addHandler(watch)
        log.setLevel(watch.level)
        stack.callback(log.setLevel, level)
        stack.callback(log.removeHandler, watch)
        try:
            yield made
        finally:
            made.close()
