"""A whole cluster in one event loop: a coordinator and workers over in-memory links or real sockets, real engines.

The plan is planned, or injected with `serve(ranges)`: any ranges, overlapping ones entered mid-range.
`settled` asserts that nothing leaked: no KV page, no open sequence, no reservation, nobody waiting.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from helixd.coordinator.coordinator import Coordinator, CoordinatorOptions, ServedModel
from helixd.coordinator.generation import Delta, Event, Failed, Finished, GenerationRequest, PromptScored
from helixd.coordinator.planning import PlanningOptions
from helixd.coordinator.replanning import ReplanOptions
from helixd.errors import JoinRefused
from helixd.ids import Incarnation, NodeId, PeerId, RequestId
from helixd.layers import LayerRange
from helixd.model.config import load_config
from helixd.model.digests import data_identity, weight_digests
from helixd.model.index import SafetensorsIndex, fingerprint
from helixd.plan.cluster.spec import COORDINATOR, WorkloadSpec
from helixd.plan.plan import Hop, Plan
from helixd.sampling import SamplingParams, TokenLogprobs
from helixd.wire.endpoint import Endpoint
from helixd.wire.link import Link
from helixd.wire.memory import MemoryEndpoint, MemoryNetwork
from helixd.wire.options import WireOptions
from helixd.wire.peers import PeerIdentity
from helixd.worker.backend import NodeSetup
from helixd.worker.local_copy import LocalDigests
from helixd.worker.torch_backend import TorchBackend
from helixd.worker.weights import LocalStore
from helixd.worker.worker import Worker, WorkerOptions

Carrier = Literal["memory", "sockets"]
NEVER = 1_000_000
GREEDY = SamplingParams(seed=0, temperature=0.0)


class Over(Exception):
    """Ends the cluster's tasks."""


class Letters:
    """A detokenizer whose text names every id."""

    def feed(self, token_id: int) -> str:
        return f"<{token_id}>"

    def flush(self) -> str:
        return ""


@dataclass(slots=True)
class Answer:
    """What one choice gave."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    text: str = ""
    reason: str | None = None


@dataclass(slots=True)
class Outcome:
    """What a request gave."""

    choices: dict[int, Answer] = field(default_factory=dict)
    scored: PromptScored | None = None
    failed: Failed | None = None
    retries: int = 0
    route: tuple[str, ...] = ()

    @property
    def tokens(self) -> list[int]:
        assert self.failed is None, self.failed
        return self.choices[0].tokens


def served_model(path: Path, max_context_tokens: int) -> ServedModel:
    config = load_config(path)
    index = SafetensorsIndex.open(path)
    return ServedModel(
        path.name, fingerprint(path, index), config, (path / "config.json").read_text(), "float32", max_context_tokens,
        (), index, lambda prompt: Letters(), lambda stop: weight_digests(index, None, stop), data_identity(index),
    )  # fmt: skip


@dataclass(slots=True)
class WorkerUnit:
    name: str
    worker: Worker
    endpoint: MemoryEndpoint | Endpoint
    task: asyncio.Task[None]

    @property
    def node(self) -> NodeId:
        """Its one device."""
        return NodeId(self.name)


class Cluster:
    """Use `cluster(...)`."""

    def __init__(self, path: Path, carrier: Carrier, options: CoordinatorOptions, max_context_tokens: int) -> None:
        self.network = MemoryNetwork()
        self.units: list[WorkerUnit] = []
        self.refusals: list[str] = []
        self.model = served_model(path, max_context_tokens)
        self._path = path
        self._state = path.with_name(f"{path.name}-state")
        self._carrier = carrier
        self._options = options
        self._stack = AsyncExitStack()
        self._requests = 0
        self.coordinator: Coordinator

    async def open(self) -> None:
        tasks = await self._stack.enter_async_context(asyncio.TaskGroup())
        self._tasks = tasks
        parts: list[Coordinator] = []
        self._hub = await self._endpoint(
            "hub", lambda link: parts[0].on_link(link), lambda link, reason: parts[0].on_lost(link, reason)
        )
        self.address = await self._hub.listen("127.0.0.1", 0)
        self.coordinator = Coordinator(tasks, self._hub, self.model, self._options)
        parts.append(self.coordinator)
        self.coordinator.start()

    async def add_worker(
        self, name: str, memory_bytes: int, incarnation: int = 1, state: Path | None = None, copy: Path | None = None,
        cache: Path | None = None,
    ) -> WorkerUnit:  # fmt: skip
        """`state` remembers measurements; all workers of a checkpoint share one unless told otherwise.

        `copy`: a checkpoint of its own, that is compared with the coordinator's. `cache`: it fetches, and keeps here.
        """
        parts: list[Worker] = []
        endpoint = await self._endpoint(
            name, lambda link: parts[0].on_link(link), lambda link, reason: parts[0].on_lost(link, reason), incarnation
        )
        _, port = await endpoint.listen("127.0.0.1", 0)

        async def connect() -> Link:
            return await endpoint.dial(*self.address, 5.0)

        setup = NodeSetup(NodeId(name), "cpu", "test", memory_bytes, memory_bytes, 1)
        options = WorkerOptions(advertise="127.0.0.1", port=port, status_interval_s=0.1, state_dir=state or self._state)
        index = SafetensorsIndex.open(copy or self._path)
        store = LocalStore(index)
        if copy is not None:
            digests = LocalDigests(index, None).digests
            options = replace(options, local_fingerprint=fingerprint(copy, index), local_digests=digests)
            store = LocalStore(index, digests)
        if cache is not None:
            options = replace(options, cache_dir=cache)
        worker = Worker(endpoint, connect, [setup], options, TorchBackend(store if cache is None else None))
        parts.append(worker)
        unit = WorkerUnit(name, worker, endpoint, self._tasks.create_task(self._run(worker), name=f"worker {name}"))
        self.units.append(unit)
        return unit

    async def kill(self, unit: WorkerUnit) -> None:
        """What a killed process looks like from outside."""
        self.units.remove(unit)
        if isinstance(unit.endpoint, MemoryEndpoint):
            self.network.kill(unit.endpoint)
        unit.task.cancel()
        await asyncio.wait({unit.task})
        await unit.endpoint.close()

    async def joined(self, count: int) -> None:
        """Everybody is measured, and every link between them probed."""
        async with asyncio.timeout(60):
            while (
                sum(node.measured is not None for node in self.coordinator.fleet.nodes.values()) < count
                or not self.coordinator.prober.complete
            ):
                await asyncio.sleep(0.005)

    async def serve(self, ranges: dict[str, tuple[int, int]], *, mesh: bool = False) -> None:
        """Push a plan with these ranges, every usable edge (`mesh`: every edge) open; wait until all of it serves."""
        self.coordinator.epochs.push(make_plan(self.model.config.num_layers, ranges, mesh=mesh))
        epoch = self.coordinator.epochs.coming.epoch if self.coordinator.epochs.coming else None
        async with asyncio.timeout(60):
            while not (active := self.coordinator.epochs.active) or active.epoch != epoch:
                await asyncio.sleep(0.01)
        assert not self.coordinator.epochs.unready_nodes()

    async def ready(self) -> None:
        async with asyncio.timeout(60):
            while not self.coordinator.readiness().ready:
                await asyncio.sleep(0.02)

    def request(self, prompt: Sequence[int], max_tokens: int | None, **fields: object) -> GenerationRequest:
        self._requests += 1
        base = GenerationRequest(RequestId(f"r{self._requests}"), tuple(prompt), 1, max_tokens, GREEDY)
        return replace(base, **fields)  # type: ignore[arg-type]

    async def ask(self, prompt: Sequence[int], max_tokens: int | None, **fields: object) -> Outcome:
        """Submit and collect to the end."""
        generation = await self.coordinator.submit(self.request(prompt, max_tokens, **fields))
        outcome = Outcome()
        async for event in generation.events():
            take(outcome, event)
        outcome.retries, outcome.route = generation.retries, generation.route
        return outcome

    async def settled(self) -> None:
        """Nothing runs, nothing is held, the books agree. Waits for the last confirmations."""
        coordinator = self.coordinator
        async with asyncio.timeout(20):
            while (
                coordinator.admission.running
                or coordinator.admission.waiting
                or coordinator.admission.ledger.total_used()
                or any(host.engine.kv_pages_used for unit in self.units for host in unit.worker.hosts.values())
                or any(
                    host.runtime and host.runtime.open_sequences for u in self.units for host in u.worker.hosts.values()
                )
            ):
                await asyncio.sleep(0.02)
        for unit in self.units:
            for host in unit.worker.hosts.values():
                host.engine.check_integrity()
                assert host.runtime is not None
                assert host.runtime.queued_tokens == 0

    async def close(self) -> None:
        for unit in self.units:
            unit.task.cancel()
        await asyncio.wait({unit.task for unit in self.units})
        try:
            await self._stack.__aexit__(Over, Over(), None)
        except* Over:
            pass

    async def _run(self, worker: Worker) -> None:
        try:
            await worker.run()
        except* JoinRefused as group:
            self.refusals.extend(map(str, group.exceptions))

    async def _endpoint(self, name: str, on_link, on_lost, incarnation: int = 1):  # type: ignore[no-untyped-def]
        identity = PeerIdentity(PeerId(name), Incarnation(incarnation))
        options = WireOptions(small_payload_bytes=4096, chunk_bytes=4096)
        if self._carrier == "memory":
            made = MemoryEndpoint(self.network, identity, options, lambda *_: None, on_link, on_lost)
        else:
            made = Endpoint(identity, options, None, lambda *_: None, on_link, on_lost)
        return await self._stack.enter_async_context(made)


def take(outcome: Outcome, event: Event) -> None:
    match event:
        case Delta(choice, text, tokens):
            answer = outcome.choices.setdefault(choice, Answer())
            answer.text += text
            answer.tokens.extend(token.id for token in tokens)
            answer.logprobs.extend(token.logprobs for token in tokens)
        case Finished(choice, reason, completion_tokens):
            answer = outcome.choices.setdefault(choice, Answer())
            answer.reason = reason
            assert completion_tokens == len(answer.tokens)
        case PromptScored():
            outcome.scored = event
        case Failed():
            outcome.failed = event


def make_plan(num_layers: int, ranges: dict[str, tuple[int, int]], *, mesh: bool = False) -> Plan:
    """Every node with its range; every edge that partial inference allows carries flow, or every edge at all."""
    placement = {NodeId(name): LayerRange.of(pair) for name, pair in ranges.items()}
    schedule: dict[NodeId, tuple[Hop, ...]] = {
        COORDINATOR: tuple(Hop(node, 1.0) for node, held in placement.items() if held.start == 0)
    }
    for node, held in placement.items():
        if held.end == num_layers:
            schedule[node] = (Hop(COORDINATOR, 1.0),)
        else:
            schedule[node] = tuple(
                Hop(other, 1.0) for other, onward in placement.items() if onward.start <= held.end < onward.end
            )
    if mesh:
        for node in placement:
            schedule[node] = tuple(Hop(other, 1.0) for other in (*placement, COORDINATOR) if other != node)
    return Plan(num_layers, placement, schedule, 1.0)


@asynccontextmanager
async def cluster(
    path: Path, memory_bytes: dict[str, int], *, carrier: Carrier = "memory", planned: bool = False,
    max_context_tokens: int = 2048, **options: object,
) -> AsyncIterator[Cluster]:  # fmt: skip
    """Workers by name with their budgets. `planned`: the planner places layers; else use `serve`."""
    base = CoordinatorOptions(
        # Once there is a plan, a re-plan waits for nobody: only what settles never is never planned.
        replan=ReplanOptions(
            wait_for_nodes=len(memory_bytes) if planned else NEVER, settle_s=0.05 if planned else NEVER, cooldown_s=0.0
        ),
        planning=PlanningOptions(time_limit_s=5.0, workload=WorkloadSpec(min_kv_tokens=256.0)),
        failover_wait_s=10.0, probe_bytes=64 << 10,
    )  # fmt: skip
    made = Cluster(path, carrier, replace(base, **options), max_context_tokens)  # type: ignore[arg-type]
    await made.open()
    try:
        for name, budget in memory_bytes.items():
            await made.add_worker(name, budget)
        await made.joined(len(memory_bytes))
        if planned:
            await made.ready()
        yield made
    finally:
        await made.close()
