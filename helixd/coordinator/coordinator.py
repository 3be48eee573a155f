"""The coordinator: ties membership, plans, admission and sequences together and offers `Service` to the API.

Handles what workers say, in one place; each decision lives in the module named for it. Its state is the truth of every
request; what workers hold can be thrown away and rebuilt from here.
"""

import asyncio
import logging
import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from helixd import logs
from helixd.coordinator.admission import Admission
from helixd.coordinator.desk import WorkerDesk
from helixd.coordinator.drift import DriftOptions
from helixd.coordinator.drifting import DriftWatch
from helixd.coordinator.epochs import Epochs
from helixd.coordinator.fleet import Fleet
from helixd.coordinator.generation import Failed, Generation, GenerationRequest, Readiness, Refused
from helixd.coordinator.planning import ModelSizes, PlanningOptions
from helixd.coordinator.probing import Prober
from helixd.coordinator.relay import Relay
from helixd.coordinator.replanning import Replanner, ReplanOptions
from helixd.coordinator.request import RequestRun
from helixd.coordinator.sequence import Lease, SequenceLimits, SequenceRun
from helixd.coordinator.text import ChoiceText, Detokenizer
from helixd.coordinator.view import cluster_view, readiness
from helixd.coordinator.weights import WeightCheck, WeightServer
from helixd.ids import Epoch, NodeId, SequenceId
from helixd.model.decoder import DecoderConfig, DType
from helixd.model.digests import WeightDigests
from helixd.model.index import SafetensorsIndex
from helixd.protocol import messages as m
from helixd.protocol.codec import to_frame
from helixd.wire.link import FrameHandler, Link
from helixd.wire.peers import PeerNetwork

log = logging.getLogger(__name__)

SEQUENCES_PER_LIFE = 1 << 32
FIRST_EPOCH = Epoch(0)
ROUTE_IN_HEADERS_S = 1.0
"""A client that asks is told its route with the headers, unless it waits in line for longer than this."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The model as the coordinator serves it. `new_detokenizer(prompt)` makes one per choice.

    `digests`: computes those of its weights, blocking, until the event is set; None: copies are not compared.
    `weights`: another word when the weights' files are others.
    """

    name: str
    fingerprint: str
    config: DecoderConfig
    config_text: str
    dtype: DType
    max_context_tokens: int
    eos_ids: tuple[int, ...]
    index: SafetensorsIndex | None
    new_detokenizer: Callable[[tuple[int, ...]], Detokenizer]
    digests: Callable[[threading.Event], WeightDigests] | None = None
    weights: str = ""


@dataclass(frozen=True, slots=True)
class CoordinatorOptions:
    """Settings of a coordinator; units in the names."""

    queue: int = 256
    max_batch_sequences: int = 64
    max_batch_tokens: int = 512
    prefill_chunk_tokens: int = 256
    step_s: float = 60.0
    failover_wait_s: float = 30.0
    max_migrations: int = 3
    probe_bytes: int = 4 << 20
    probe_timeout_s: float = 30.0
    planning: PlanningOptions = field(default_factory=PlanningOptions)
    replan: ReplanOptions = field(default_factory=ReplanOptions)
    drift: DriftOptions = field(default_factory=DriftOptions)


class Coordinator:
    """One coordinator daemon. `start` it; its tasks live in `tasks`. The network calls `on_link` and `on_lost`."""

    def __init__(
        self, tasks: asyncio.TaskGroup, network: PeerNetwork, model: ServedModel, options: CoordinatorOptions,
        first_epoch: Epoch = FIRST_EPOCH, remember_epoch: Callable[[Epoch], None] = lambda epoch: None,
    ) -> None:  # fmt: skip
        self.model = model
        self.options = options
        self.network = network
        self.fleet = Fleet()
        self.sizes = ModelSizes.of(model.config, model.dtype)
        self.draining = False
        self.admission = Admission(
            options.queue, options.failover_wait_s, options.planning.workload.mean_output_tokens, self._masks
        )  # fmt: skip
        self.epochs = Epochs(self.fleet, self.admission, self.sizes, first_epoch, remember_epoch)
        self.replanner = Replanner(
            self.fleet, self.epochs, self.admission, model.name, self.sizes, options.planning, options.replan
        )  # fmt: skip
        self.prober = Prober(
            self.fleet, network.identity.peer, tasks, self.replanner.something_changed, options.probe_bytes,
            options.probe_timeout_s,
        )  # fmt: skip
        self.relay = Relay(self.fleet, self.epochs.relays)
        self.drift = DriftWatch(
            self.fleet, options.drift, network.identity.peer, self.replanner.drifted, self.epochs.uses,
            self.prober.again,
        )  # fmt: skip
        self.desk = WorkerDesk(
            self.fleet, self.admission, self.epochs, self.replanner, self.prober, WeightServer(model.index),
            WeightCheck(model.digests, tasks), self.relay, self.drift, self._greeting, tasks,
        )  # fmt: skip
        self._tasks = tasks
        # Not the incarnation: a coordinator that lost its state counts its lives anew, before workers that remember.
        life = int.from_bytes(network.identity.instance[-4:], "big") % (1 << 31)
        self._next_sequence = life * SEQUENCES_PER_LIFE
        self._requests: set[RequestRun] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    # -- life --------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to admit and to plan."""
        self._tasks.create_task(self.admission.run(), name="admission")
        self._tasks.create_task(self.replanner.run(lambda: self.prober.complete), name="replanner")

    async def drain(self, timeout_s: float) -> None:
        """Take nothing new and wait for what runs, at most `timeout_s`; what runs on then is ended."""
        self.draining = True
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            logs.event(log, logging.WARNING, "drain_timeout", requests=len(self._requests), limit_s=timeout_s)
            self.end_requests()
        finally:
            self.desk.closing = True

    def end_requests(self) -> None:
        """End whatever runs or waits, with an error that says why."""
        for run in self._requests:
            run.give_up(Failed("shutting_down", "the server is stopping and did not finish this request"))

    def reconfigure(self, options: CoordinatorOptions) -> None:
        """Go by these options from now on: what the line, steps and moves are allowed. Requests that run keep theirs.

        Plans, batches and probes go on as before.
        """
        self.options = options
        self.admission.reconfigure(options.queue, options.failover_wait_s)

    # -- Service -----------------------------------------------------------------------------------------------------

    @property
    def model_name(self) -> str:
        """The served model's name."""
        return self.model.name

    @property
    def max_context_tokens(self) -> int:
        """Prompt and output together, at most."""
        return self.model.max_context_tokens

    def readiness(self) -> Readiness:
        """Whether a complete pipeline exists and the daemon is not draining."""
        return readiness(self)

    def cluster_view(self) -> Mapping[str, object]:
        """What `/cluster` shows."""
        return cluster_view(self)

    async def submit(self, request: GenerationRequest) -> Generation:
        """Admit a request. Raises Refused."""
        self._check(request)
        run = RequestRun(request)
        # Where no pipeline's KV holds a whole context, an answer ends as it does at the context's end: with `length`.
        room = self.admission.longest(self.max_context_tokens) - len(request.prompt)
        max_tokens = room if request.max_tokens is None else min(room, request.max_tokens)
        end_ids = {*request.stop_token_ids, *(() if request.ignore_eos else self.model.eos_ids)}
        limits = SequenceLimits(self.options.step_s, self.options.max_migrations)
        sequences = []
        for choice in range(request.n):
            text = ChoiceText(
                choice, max_tokens, end_ids, request.stop, self.model.new_detokenizer(request.prompt)
            )  # fmt: skip
            self._next_sequence += 1
            sequence = SequenceRun(
                SequenceId(self._next_sequence), request, choice, text, max_tokens, self, limits, run.emit
            )  # fmt: skip
            sequence.order = self._next_sequence % SEQUENCES_PER_LIFE
            sequences.append(sequence)
        run.sequences = sequences
        self._requests.add(run)
        self._idle.clear()
        run.bind(self._tasks.create_task(self._run(run), name=f"request {request.request_id}"))
        try:
            await run.wait_routed(ROUTE_IN_HEADERS_S)
        except asyncio.CancelledError:
            # The client left before it could be given anything to cancel.
            await run.cancel()
            raise
        if run.turned_away:
            await run.cancel()
            raise self._queue_full()
        return run

    # -- Hub, for sequences ------------------------------------------------------------------------------------------

    async def acquire(self, run: SequenceRun) -> Lease:
        """A reserved route. Raises NoRoute."""
        return await self.admission.acquire(run)

    def send(self, node: NodeId, message: m.Message, payload: memoryview | None = None) -> None:
        """Post a message to a node's peer; dropped if it is gone."""
        peer = self.fleet.peer_of(node)
        if peer is not None:
            peer.outbox.post(to_frame(message, payload))

    def release(self, lease: Lease) -> None:
        """Close an attempt on every hop."""
        self.admission.forget(lease)
        for hop in lease.route.hops:
            if self.fleet.peer_of(hop.node) is None:
                self.admission.freed(hop.node, lease.sequence, lease.attempt)
            else:
                self.send(hop.node, m.Close(lease.sequence, lease.attempt, hop.node))
        self.admission.something_changed()
        self.epochs.retire_drained()
        self.desk.release_drained_peers()

    def progressed(self, lease: Lease, tokens: int) -> None:
        """A sequence grew."""
        self.admission.progressed(lease, tokens)

    def step_took_too_long(self, lease: Lease, waited_s: float) -> None:
        """A step of a sequence is not done in time."""
        self.desk.step_took_too_long(lease, waited_s)

    # -- the network's hooks -----------------------------------------------------------------------------------------

    def on_link(self, link: Link) -> FrameHandler:
        """A worker connected."""
        return self.desk.on_link(link)

    def on_lost(self, link: Link, reason: str) -> None:
        """A worker's link closed."""
        self.desk.on_lost(link, reason)

    def _greeting(self) -> tuple[m.Welcome, memoryview]:
        model, options = self.model, self.options
        welcome = m.Welcome(
            model.name, model.fingerprint, model.dtype, model.max_context_tokens,
            options.max_batch_sequences, options.max_batch_tokens, options.prefill_chunk_tokens, weights=model.weights,
        )  # fmt: skip
        return welcome, memoryview(model.config_text.encode())

    # -- helpers -----------------------------------------------------------------------------------------------------

    async def _run(self, run: RequestRun) -> None:
        try:
            await run.run()
        finally:
            self._requests.discard(run)
            if not self._requests:
                self._idle.set()
            for sequence in run.sequences:
                self.admission.ended(sequence)

    def _check(self, request: GenerationRequest) -> None:
        limit = self.max_context_tokens
        if len(request.prompt) + (0 if request.max_tokens == 0 else 1) > limit:
            raise Refused(
                400, "context_length_exceeded",
                f"This model's maximum context length is {limit} tokens; the prompt has {len(request.prompt)}.",
            )  # fmt: skip
        ready = self.readiness()
        if not ready.ready and (self.draining or not self.admission.running):
            raise Refused(
                503, ready.code, ready.message, retry_after_s=5.0, permanent=ready.code == "no_feasible_placement"
            )
        if not self.admission.fits_when_empty(len(request.prompt)):
            raise Refused(
                400, "context_length_exceeded",
                f"The prompt has {len(request.prompt)} tokens, more than the KV cache of any pipeline of this cluster.",
            )  # fmt: skip
        if self.admission.full:
            raise self._queue_full()

    def _queue_full(self) -> Refused:
        return Refused(
            429, "rate_limit_exceeded",
            f"There is no room for this request now, and no place in the queue, which holds {self.options.queue}; "
            "try again later.",
            retry_after_s=2.0,
        )  # fmt: skip

    def _masks(self) -> tuple[Collection[NodeId], Collection[tuple[NodeId, NodeId]]]:
        nodes = self.epochs.unready_nodes() | self.fleet.unusable_nodes()
        return nodes, self.fleet.unusable_links() - self.epochs.relayed_links()
