"""The coordinator: ties membership, plans, admission and sequences together and offers `Service` to the API.

Handles what workers say, in one place; each decision lives in the module named for it. Its state is the truth of every
request; what workers hold can be thrown away and rebuilt from here.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field

from helixd.coordinator.admission import Admission
from helixd.coordinator.epochs import Epochs
from helixd.coordinator.fleet import Fleet, Peer
from helixd.coordinator.generation import Generation, GenerationRequest, Readiness, Refused
from helixd.coordinator.planning import ModelSizes, PlanningOptions
from helixd.coordinator.probing import Prober
from helixd.coordinator.replanning import Replanner, ReplanOptions
from helixd.coordinator.request import RequestRun
from helixd.coordinator.sequence import Broken, Lease, ScoresArrived, SequenceLimits, SequenceRun, TokenArrived
from helixd.coordinator.text import ChoiceText, Detokenizer
from helixd.coordinator.view import cluster_view, readiness
from helixd.coordinator.weights import WeightServer
from helixd.ids import Attempt, Epoch, NodeId, PeerId, SequenceId
from helixd.model.decoder import DecoderConfig, DType
from helixd.model.index import SafetensorsIndex
from helixd.protocol import messages as m
from helixd.protocol.codec import ProtocolError, from_frame, to_frame
from helixd.sampling import TokenLogprobs
from helixd.wire.link import Frame, Link
from helixd.wire.outbox import Outbox
from helixd.wire.peers import PeerNetwork

log = logging.getLogger(__name__)

SEQUENCES_PER_LIFE = 1 << 32
FIRST_EPOCH = Epoch(0)


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The model as the coordinator serves it. `new_detokenizer(prompt)` makes one per choice."""

    name: str
    fingerprint: str
    config: DecoderConfig
    config_text: str
    dtype: DType
    max_context_tokens: int
    eos_ids: tuple[int, ...]
    index: SafetensorsIndex | None
    new_detokenizer: Callable[[tuple[int, ...]], Detokenizer]


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


class Coordinator:
    """One coordinator daemon. `run` serves until cancelled; the network calls `on_link` and `on_lost`."""

    def __init__(
        self, network: PeerNetwork, model: ServedModel, options: CoordinatorOptions,
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
        self.failovers = 0
        self.preemptions = 0
        self._weights = WeightServer(model.index)
        self._prober: Prober | None = None
        self._tasks: asyncio.TaskGroup | None = None
        self._next_sequence = network.identity.incarnation % (1 << 31) * SEQUENCES_PER_LIFE
        self._requests: set[RequestRun] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    # -- life --------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            self._prober = Prober(
                self.fleet, self.network.identity.peer, tasks, self.replanner.something_changed,
                self.options.probe_bytes, self.options.probe_timeout_s,
            )  # fmt: skip
            tasks.create_task(self.admission.run(), name="admission")
            tasks.create_task(
                self.replanner.run(lambda: self._prober is None or self._prober.complete), name="replanner"
            )

    async def drain(self, timeout_s: float) -> None:
        """Take nothing new and wait for what runs, at most `timeout_s`."""
        self.draining = True
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            log.warning("%d requests still run after %g s of draining; they end now", len(self._requests), timeout_s)

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
        assert self._tasks is not None
        run = RequestRun(request)
        room = self.max_context_tokens - len(request.prompt)
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
            sequence.order = self._next_sequence
            sequences.append(sequence)
        run.sequences = sequences
        self._requests.add(run)
        self._idle.clear()
        run.bind(self._tasks.create_task(self._run(run), name=f"request {request.request_id}"))
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
        self._release_drained_peers()

    def progressed(self, lease: Lease, tokens: int) -> None:
        """A sequence grew."""
        self.admission.progressed(lease, tokens)

    # -- the network's hooks -----------------------------------------------------------------------------------------

    def on_link(self, link: Link) -> Callable[[Link, Frame], Awaitable[None]]:
        """A worker connected; it is nobody until its hello."""
        return self._on_frame

    def on_lost(self, link: Link, reason: str) -> None:
        """A worker's link closed: what it held is gone, its sequences move."""
        peer = self.fleet.remove(link.peer, link)
        if peer is None:
            return
        log.warning("worker %s lost: %s", peer.id, reason)
        if self._prober is not None:
            self._prober.on_peer_lost(peer.id)
        gone = frozenset(peer.nodes)
        for node in gone:
            self.epochs.on_node_lost(node)
        moved = self.admission.break_where(
            lambda lease: not gone.isdisjoint(lease.route.nodes), "peer_lost", f"worker {peer.id} was lost"
        )
        self.failovers += moved
        for node in gone:
            self.admission.node_gone(node)
        self.replanner.something_changed()

    # -- what workers say --------------------------------------------------------------------------------------------

    async def _on_frame(self, link: Link, frame: Frame) -> None:
        message = from_frame(frame)
        if isinstance(message, m.Hello):
            self._on_hello(link, message)
            return
        peer = self.fleet.peers.get(link.peer)
        if peer is None or peer.link is not link:
            raise ProtocolError(f"{link.peer} sent {type(message).__name__} before a welcome")
        match message:
            case m.Tokens():
                for drawn in message.drawn:
                    self._on_drawn(drawn)
            case m.Scores():
                scores = tuple(TokenLogprobs(lp, tuple(top)) for lp, top in message.scores)
                if (run := self.admission.holder(SequenceId(message.sequence))) is not None:
                    run.deliver(ScoresArrived(Attempt(message.attempt), message.start, scores))
            case m.StageFailed():
                self._on_stage_failed(message)
            case m.Closed():
                node = NodeId(message.node)
                self.admission.freed(node, SequenceId(message.sequence), Attempt(message.attempt))
            case m.NodeStatus():
                self._on_status(message)
            case m.EpochState():
                self.epochs.on_state(message)
                self.admission.something_changed()
            case m.Measured():
                self._on_measured(peer, message)
            case m.Probed():
                if self._prober is not None:
                    self._prober.on_probed(peer.id, message)
            case m.LinkLost():
                self._on_link_lost(peer, message)
            case m.Fetch():
                await self._weights.answer(peer, message)
            case m.Leave():
                self._on_leave(peer, message)
            case _:
                raise ProtocolError(f"a worker must not send {type(message).__name__}")

    def _on_hello(self, link: Link, hello: m.Hello) -> None:
        assert self._tasks is not None
        outbox = Outbox(link, lambda: None)
        self._tasks.create_task(outbox.run(), name=f"send to {link.peer}")
        wrong = self._why_not(hello)
        old = self.fleet.peers.get(link.peer)
        if wrong is None and old is not None and old.link is not link:
            self.on_lost(old.link, "a newer life of this worker joined")
        if wrong is None:
            host = hello.advertise or link.remote_host
            peer = Peer(link.peer, link.incarnation, link, outbox, host, hello.port, hello)
            taken = self.fleet.add(peer)
            if taken:
                wrong = m.Refused("node_id", f"node ids already taken by another worker: {', '.join(taken)}", True)
        if wrong is not None:
            log.warning("worker %s refused (%s): %s", link.peer, wrong.code, wrong.message)
            outbox.post(to_frame(wrong))
            return
        log.info("worker %s joined with %s", link.peer, ", ".join(n.node for n in hello.nodes) or "no nodes")
        model, options = self.model, self.options
        outbox.post(
            to_frame(
                m.Welcome(
                    model.name, model.fingerprint, model.dtype, model.max_context_tokens,
                    options.max_batch_sequences, options.max_batch_tokens, options.prefill_chunk_tokens,
                ),
                memoryview(model.config_text.encode()),
            )
        )  # fmt: skip

    def _why_not(self, hello: m.Hello) -> m.Refused | None:
        if hello.protocol != m.PROTOCOL_VERSION:
            return m.Refused(
                "version",
                f"protocol version {hello.protocol} ({hello.software}) does not fit {m.PROTOCOL_VERSION} here", True,
            )  # fmt: skip
        if hello.fingerprint and hello.fingerprint != self.model.fingerprint:
            return m.Refused(
                "fingerprint",
                f"its copy of the model has fingerprint {hello.fingerprint}, the coordinator serves "
                f"{self.model.name} with {self.model.fingerprint}; use the same files, or none (they are fetched)",
                True,
            )  # fmt: skip
        return None

    def _on_measured(self, peer: Peer, message: m.Measured) -> None:
        node = self.fleet.nodes.get(NodeId(message.node))
        if node is None or node.peer != peer.id:
            raise ProtocolError(f"{peer.id} measured node {message.node}, which is not its own")
        node.measured = message
        if all(self.fleet.nodes[n].measured is not None for n in peer.nodes):
            self.epochs.welcome_back(peer.nodes)
            if self._prober is not None:
                self._prober.pump()
            self.replanner.something_changed()

    def _on_status(self, status: m.NodeStatus) -> None:
        node = self.fleet.nodes.get(NodeId(status.node))
        if node is not None:
            node.status = status
            if status.kv_capacity_token_layers:
                self.admission.ledger.set_capacity(node.id, status.kv_capacity_token_layers)

    def _on_drawn(self, drawn: m.Drawn) -> None:
        run = self.admission.holder(SequenceId(drawn.sequence))
        if run is not None:
            logprobs = None if drawn.logprob is None else TokenLogprobs(drawn.logprob, tuple(drawn.top))
            run.deliver(TokenArrived(Attempt(drawn.attempt), drawn.step, drawn.token, logprobs))

    def _on_stage_failed(self, message: m.StageFailed) -> None:
        run = self.admission.holder(SequenceId(message.sequence))
        if run is None or run.lease is None or run.lease.attempt != message.attempt:
            return
        log.info("sequence %d broke at %s (%s): %s", run.id, message.node, message.code, message.message)
        if message.code == "kv_full":
            self.preemptions += 1
            self.admission.relieve(NodeId(message.node), "an older sequence needs its KV room")
        else:
            self.failovers += 1
        run.deliver(Broken(Attempt(message.attempt), message.code, message.message))

    def _on_link_lost(self, peer: Peer, message: m.LinkLost) -> None:
        other = PeerId(message.peer)
        if other not in self.fleet.peers:
            return
        log.warning("link %s - %s lost: %s", peer.id, other, message.reason)
        ours, theirs = frozenset(peer.nodes), frozenset(self.fleet.peers[other].nodes)

        def crosses(lease: Lease) -> bool:
            return any((a in ours and b in theirs) or (a in theirs and b in ours) for a, b in lease.route.links)

        self.failovers += self.admission.break_where(crosses, "link_lost", f"link {peer.id} - {other} was lost")
        if self._prober is not None:
            self._prober.link_lost(peer.id, other, message.reason)

    def _on_leave(self, peer: Peer, message: m.Leave) -> None:
        log.info("worker %s leaves: %s", peer.id, message.reason)
        peer.draining = True
        nodes = frozenset(peer.nodes)
        self.admission.break_where(
            lambda lease: not nodes.isdisjoint(lease.route.nodes), "draining", f"worker {peer.id} is leaving"
        )
        self.replanner.something_changed()
        self._release_drained_peers()

    def _release_drained_peers(self) -> None:
        for peer in self.fleet.peers.values():
            if peer.draining and all(
                set(peer.nodes).isdisjoint(lease.route.nodes) for lease in self.admission.leases()
            ):
                peer.outbox.post(to_frame(m.Left()))

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
        if not ready.ready and not self.admission.running:
            raise Refused(
                503, ready.code, ready.message, retry_after_s=5.0, permanent=ready.code == "no_feasible_placement"
            )
        if not self.admission.fits_when_empty(len(request.prompt)):
            raise Refused(
                400, "context_length_exceeded",
                f"The prompt has {len(request.prompt)} tokens, more than the KV cache of any pipeline of this cluster.",
            )  # fmt: skip
        if self.admission.full:
            raise Refused(
                429, "rate_limit_exceeded",
                f"{self.admission.waiting} requests are waiting already; try again later.", retry_after_s=2.0,
            )  # fmt: skip

    def _masks(self) -> tuple[Collection[NodeId], Collection[tuple[NodeId, NodeId]]]:
        nodes = self.epochs.unready_nodes() | self.fleet.unusable_nodes()
        return nodes, self.fleet.unusable_links()
