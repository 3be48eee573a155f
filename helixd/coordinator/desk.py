"""The desk where workers are served: what each of their messages makes the coordinator do.

Checks who joins, keeps the fleet's facts, and passes tokens, failures and confirmations on to the sequences, the epochs
and the prober. Decides nothing about plans or routes itself.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from itertools import pairwise

import msgspec

from helixd import __version__, logs
from helixd.coordinator.admission import Admission
from helixd.coordinator.drifting import DriftWatch
from helixd.coordinator.epochs import Epochs
from helixd.coordinator.fleet import AS_MEASURED, Fleet, Peer
from helixd.coordinator.probing import Prober
from helixd.coordinator.relay import Relay
from helixd.coordinator.replanning import Replanner
from helixd.coordinator.sequence import LINK_CUT, Broken, Lease, ScoresArrived, TokenArrived
from helixd.coordinator.weights import WeightCheck, WeightServer
from helixd.ids import Attempt, NodeId, PeerId, SequenceId
from helixd.plan.cluster.spec import COORDINATOR
from helixd.protocol import messages as m
from helixd.protocol import versions
from helixd.protocol.codec import ProtocolError, from_frame, to_frame
from helixd.sampling import TokenLogprobs
from helixd.wire.link import Frame, FrameHandler, Link
from helixd.wire.outbox import Outbox

log = logging.getLogger(__name__)

STAGE_CODES = frozenset({"kv_full", "stale_epoch", "link_lost", "compute", "order"})
"""What a worker may say of a stage; any other word counts as `compute`: some reasons of our own are free of charge."""

Greeting = Callable[[], tuple[m.Welcome, memoryview]]


class WorkerDesk:
    """Serves the workers' links. Its tasks live in the TaskGroup it is given."""

    def __init__(
        self, fleet: Fleet, admission: Admission, epochs: Epochs, replanner: Replanner, prober: Prober,
        weights: WeightServer, check: WeightCheck, relay: Relay, drift: DriftWatch, greeting: Greeting,
        tasks: asyncio.TaskGroup,
    ) -> None:  # fmt: skip
        self.failovers = 0
        self.closing = False
        self._fleet = fleet
        self._admission = admission
        self._epochs = epochs
        self._replanner = replanner
        self._prober = prober
        self._weights = weights
        self._check = check
        self._relay = relay
        self._drift = drift
        self._greeting = greeting
        self._tasks = tasks
        self._senders: dict[Link, list[asyncio.Task[None]]] = {}

    def on_link(self, link: Link) -> FrameHandler:
        """A worker connected; it is nobody until its hello."""
        return self._on_frame

    def on_lost(self, link: Link, reason: str) -> None:
        """A worker's link closed: what it held is gone, its sequences move."""
        self._stop_sending(link)
        known = self._fleet.peers.get(link.peer)
        if known is not None and known.link is link:
            self._drift.on_peer_lost(known.id, [self._fleet.nodes[node] for node in known.nodes])
        peer = self._fleet.remove(link.peer, link)
        if peer is None:
            return
        level = logging.INFO if peer.draining or self.closing else logging.WARNING
        logs.event(log, level, "worker_lost", worker=peer.id, reason=reason)
        self._prober.on_peer_lost(peer.id)
        gone = frozenset(peer.nodes)
        for node in gone:
            self._epochs.on_node_lost(node)
        self.failovers += self._admission.break_where(
            lambda lease: not gone.isdisjoint(lease.route.nodes), "peer_lost", f"worker {peer.id} was lost"
        )
        for node in gone:
            self._admission.node_gone(node)
        self._replanner.something_changed()

    def release_drained_peers(self) -> None:
        """Let draining workers go that nothing runs on any more."""
        for peer in self._fleet.peers.values():
            used = any(not set(peer.nodes).isdisjoint(lease.route.nodes) for lease in self._admission.leases())
            if peer.draining and not used:
                peer.outbox.post(to_frame(m.Left()))

    async def _on_frame(self, link: Link, frame: Frame) -> None:
        message = from_frame(frame)
        if isinstance(message, m.Hello):
            self._on_hello(link, message, b"" if frame.payload is None else bytes(frame.payload))
            return
        peer = self._fleet.peers.get(link.peer)
        if peer is None or peer.link is not link:
            raise ProtocolError(f"{link.peer} sent {type(message).__name__} before a welcome")
        _check_own(peer, message)
        match message:
            case m.Tokens():
                for drawn in message.drawn:
                    self._on_drawn(NodeId(message.node), drawn)
            case m.Activations():
                await self._relay.carry(peer, message, frame)
            case m.Scores():
                self._on_scores(peer, message)
            case m.StageFailed():
                self._on_stage_failed(message)
            case m.Closed():
                node = NodeId(message.node)
                self._admission.freed(node, SequenceId(message.sequence), Attempt(message.attempt))
            case m.NodeStatus():
                self._on_status(message)
            case m.EpochState():
                self._epochs.on_state(message)
                self._admission.something_changed()
                if message.state == "failed":
                    self._replanner.node_failed(NodeId(message.node), message.message)
            case m.Measured():
                self._on_measured(peer, message)
            case m.Probed():
                if not message.error and not message.bandwidth_bytes_per_s:
                    raise ProtocolError(f"{peer.id} measured no bandwidth and no error")
                self._prober.on_probed(peer.id, message)
            case m.LinkLost():
                self._on_link_lost(peer, message)
            case m.Fetch():
                await self._weights.answer(peer, message)
            case m.Leave():
                self._on_leave(peer, message)
            case _:
                raise ProtocolError(f"a worker must not send {type(message).__name__}")

    def _on_hello(self, link: Link, hello: m.Hello, digests: bytes) -> None:
        if link in self._senders:
            raise ProtocolError(f"{link.peer} said hello twice; what it offers is known once and for all")
        outbox = Outbox(link, lambda: None)
        self._senders[link] = [self._tasks.create_task(outbox.run(), name=f"send to {link.peer}")]
        wrong = self._why_not(link.peer, hello, digests)
        old = self._fleet.peers.get(link.peer)
        if wrong is None and old is not None and old.link is not link:
            self.on_lost(old.link, "a newer life of this worker joined")
        welcome, config_json = self._greeting()
        if wrong is None:
            if hello.held_fingerprint != welcome.data:
                hello = msgspec.structs.replace(hello, held=[])
            host = hello.advertise or link.remote_host
            peer = Peer(link.peer, link.incarnation, link, outbox, host, hello.port, hello)
            taken = self._fleet.add(peer)
            if taken:
                wrong = m.Refused("node_id", f"node ids already taken by another worker: {', '.join(taken)}", True)
            else:
                parcels = self._tasks.create_task(peer.parcels.run(), name=f"parcels to {link.peer}")
                self._senders[link].append(parcels)
        if wrong is not None:
            logs.event(log, logging.WARNING, "worker_refused", worker=link.peer, code=wrong.code, reason=wrong.message)
            outbox.post(to_frame(msgspec.structs.replace(wrong, message=m.brief(wrong.message))))
            return
        logs.event(
            log, logging.INFO, "worker_joined", worker=link.peer, name=hello.name, host=link.remote_host,
            nodes=[hardware.node for hardware in hello.nodes],
        )  # fmt: skip
        version = versions.common_version(hello.protocol, hello.oldest or hello.protocol)
        assert version is not None
        welcome = msgspec.structs.replace(welcome, protocol=version)
        outbox.post(to_frame(welcome, config_json))

    def _stop_sending(self, link: Link) -> None:
        for sender in self._senders.pop(link, ()):
            sender.cancel()

    def _why_not(self, who: PeerId, hello: m.Hello, digests: bytes) -> m.Refused | None:
        welcome, _ = self._greeting()
        oldest = hello.oldest or hello.protocol
        version = versions.common_version(hello.protocol, oldest)
        if version is None:
            older = "the worker" if hello.protocol < versions.OLDEST_VERSION else "the coordinator"
            return m.Refused(
                "version",
                f"the worker ({hello.software}) speaks protocol {oldest} to {hello.protocol}, this coordinator (helixd "
                f"{__version__}) {versions.OLDEST_VERSION} to {versions.PROTOCOL_VERSION}; upgrade {older}",
                True,
            )  # fmt: skip
        if hello.fingerprint and hello.fingerprint != welcome.fingerprint:
            return m.Refused(
                "fingerprint",
                f"its copy of the model has fingerprint {hello.fingerprint}, the coordinator serves "
                f"{welcome.model_name} with {welcome.fingerprint}; use the same files, or none (they are fetched)",
                True,
            )  # fmt: skip
        if hello.fingerprint and (digests or version > 1):
            wrong = self._check.why_not(digests)
            if wrong is not None:
                return wrong
        elif hello.fingerprint:
            logs.event(log, logging.WARNING, "weights_not_compared", software=hello.software, protocol=version)
        if who == PeerId(COORDINATOR):
            # In facts about links and in plans this name is the coordinator's, whatever its own id is.
            return m.Refused("node_id", f"no worker can be called {COORDINATOR!r}; give it another node.id", True)
        names = [hardware.node for hardware in hello.nodes]
        if len(set(names)) < len(names) or COORDINATOR in names or "" in names:
            return m.Refused(
                "node_id", f"node ids must differ, and be neither empty nor {COORDINATOR!r}: {names}", True
            )  # fmt: skip
        return None

    def _on_measured(self, peer: Peer, message: m.Measured) -> None:
        for points in (message.prompt_layer_time_s, message.decode_layer_time_s):
            if any(high[0] <= low[0] for low, high in pairwise(points)):
                raise ProtocolError(f"{peer.id} measured {message.node} at batch sizes that do not rise")
        node = self._fleet.nodes[NodeId(message.node)]
        node.measured, node.slowdown = message, AS_MEASURED
        if all(self._fleet.nodes[n].measured is not None for n in peer.nodes):
            self._epochs.welcome_back(peer.nodes)
            self._prober.pump()
            self._replanner.something_changed()

    def _on_status(self, status: m.NodeStatus) -> None:
        node = self._fleet.nodes[NodeId(status.node)]
        if self._fleet.heard(status, time.monotonic()):
            logs.event(log, logging.WARNING, "device_works_again", node=node.id)
            self._admission.something_changed()
        if status.kv_capacity_token_layers:
            self._admission.ledger.set_capacity(node.id, status.kv_capacity_token_layers)
        self._drift.on_status(node, status, time.monotonic())

    def step_took_too_long(self, lease: Lease, waited_s: float) -> None:
        """A sequence gives up its route since no token came: it, and others, keep off the device that hangs."""
        self.failovers += 1
        for node in self._fleet.suspect(lease.route.nodes, waited_s, time.monotonic()):
            logs.event(log, logging.ERROR, "device_suspected", node=node, waited_s=round(waited_s, 1))

    def _on_drawn(self, node: NodeId, drawn: m.Drawn) -> None:
        run = self._admission.holder(SequenceId(drawn.sequence))
        if run is not None and run.lease is not None and run.lease.route.hops[-1].node == node:
            logprobs = None if drawn.logprob is None else TokenLogprobs(drawn.logprob, tuple(drawn.top))
            run.deliver(TokenArrived(Attempt(drawn.attempt), drawn.step, drawn.token, logprobs))

    def _on_scores(self, peer: Peer, message: m.Scores) -> None:
        run = self._admission.holder(SequenceId(message.sequence))
        if run is not None and run.lease is not None and run.lease.route.hops[-1].node in peer.nodes:
            scores = tuple(TokenLogprobs(lp, tuple(top)) for lp, top in message.scores)
            run.deliver(ScoresArrived(Attempt(message.attempt), message.start, scores))

    def _on_stage_failed(self, message: m.StageFailed) -> None:
        run = self._admission.holder(SequenceId(message.sequence))
        if run is None or run.lease is None or run.lease.attempt != message.attempt:
            return
        if message.node not in run.lease.route.nodes:
            return
        logs.event(
            log, logging.INFO, "sequence_broken", sequence=run.id, request=run.request_id, node=message.node,
            code=message.code, reason=message.message,
        )  # fmt: skip
        code = message.code if message.code in STAGE_CODES else "compute"
        if code == "kv_full":
            self._admission.preemptions += 1
            if self._admission.shares(NodeId(message.node), run.id):
                code = "preempted"
            self._admission.relieve(NodeId(message.node), "an older sequence needs its KV room")
        else:
            self.failovers += 1
        run.deliver(Broken(Attempt(message.attempt), code, message.message))

    def _on_link_lost(self, peer: Peer, message: m.LinkLost) -> None:
        other = PeerId(message.peer)
        if other not in self._fleet.peers:
            return
        logs.event(log, logging.WARNING, "link_lost", src=peer.id, dst=other, reason=message.reason)
        ours, theirs = frozenset(peer.nodes), frozenset(self._fleet.peers[other].nodes)

        def crosses(lease: Lease) -> bool:
            return any((a in ours and b in theirs) or (a in theirs and b in ours) for a, b in lease.route.links)

        # A dial for an earlier plan may be given up late; rows that pass through here do not miss that link.
        if not self._epochs.relays(peer.id, other):
            self.failovers += self._admission.break_where(crosses, LINK_CUT, f"link {peer.id} - {other} was lost")
        self._prober.link_lost(peer.id, other, message.reason)

    def _on_leave(self, peer: Peer, message: m.Leave) -> None:
        logs.event(log, logging.INFO, "worker_leaves", worker=peer.id, reason=message.reason)
        peer.draining = True
        nodes = frozenset(peer.nodes)
        # Where nothing else serves, what runs there had better end there; another plan that serves takes it over.
        if self._admission.has_pipeline():
            self._admission.break_where(
                lambda lease: not nodes.isdisjoint(lease.route.nodes), "draining", f"worker {peer.id} is leaving"
            )
        self._replanner.something_changed()
        self.release_drained_peers()


def _check_own(peer: Peer, message: m.Message) -> None:
    """Raises ProtocolError for words about a node that is another worker's."""
    match message:
        case (
            m.Measured(node=node) | m.NodeStatus(node=node) | m.EpochState(node=node) | m.Tokens(node=node)
            | m.StageFailed(node=node) | m.Closed(node=node)
        ) if node not in peer.nodes:  # fmt: skip
            raise ProtocolError(f"{peer.id} sent {type(message).__name__} for node {node}, which is not its own")
