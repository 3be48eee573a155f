"""A worker's time with one coordinator, from `Hello` to the loss of the link: what each message makes it do.

Prepares and measures the devices, probes links, follows epochs, hands sequence messages to the nodes. Ends by raising
PeerLost; what the nodes hold (weights, measurements) outlives the session, sequences do not.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import ParamSpec, Protocol

from helixd import logs
from helixd.errors import DeviceFailed, HelixError, PeerLost
from helixd.ids import Epoch, NodeId, PeerId
from helixd.layers import LayerRange
from helixd.model.config import parse_config
from helixd.model.decoder import parse_dtype
from helixd.model.files import parse_json_object
from helixd.protocol import messages as m
from helixd.wire.link import Frame, Link
from helixd.wire.peers import PeerNetwork
from helixd.worker.backend import Backend, ModelSetup, WeightStore
from helixd.worker.batcher import BatchLimits
from helixd.worker.fetch import TensorFetcher
from helixd.worker.gauge import SpeedGauge
from helixd.worker.host import NodeHost
from helixd.worker.node import NodeRuntime
from helixd.worker.post import PostOffice
from helixd.worker.shaping import Shaping

log = logging.getLogger(__name__)

P = ParamSpec("P")

LINGER_S = 30.0
"""A link that was dialled for a probe stays as long for a plan that may want it: planning takes seconds."""


class SessionOptions(Protocol):
    """What a session needs to know of the worker's settings."""

    @property
    def dial_timeout_s(self) -> float:
        """Patience with a peer that is dialled."""
        ...

    @property
    def fetch_timeout_s(self) -> float:
        """Patience with the coordinator for one piece of a tensor."""
        ...

    @property
    def probe_timeout_s(self) -> float:
        """Patience with one probe of a link."""
        ...

    @property
    def state_dir(self) -> Path | None:
        """Where measurements are remembered."""
        ...

    @property
    def cache_dir(self) -> Path | None:
        """Where fetched weights are kept."""
        ...


class Session:
    """One coordinator link's worth of work. `tasks` end with it; what runs in `lasting` outlives it."""

    def __init__(
        self,
        link: Link,
        network: PeerNetwork,
        hosts: Mapping[NodeId, NodeHost],
        post: PostOffice,
        tasks: asyncio.TaskGroup,
        lasting: asyncio.TaskGroup,
        options: SessionOptions,
        backend: Backend,
        shaping: Shaping | None = None,
    ) -> None:
        self.link = link
        self.left = asyncio.Event()
        self._network = network
        self._hosts = hosts
        self._post = post
        self._tasks = tasks
        self._lasting = lasting
        self._options = options
        self._backend = backend
        self._shaping = shaping
        self._store: WeightStore | None = None
        self._fetcher = TensorFetcher(link, options.fetch_timeout_s)
        self._neighbours: set[PeerId] = set()
        self._relayed = False
        self._one_probe = asyncio.Lock()
        self._measured = asyncio.Event()

    async def welcome(self, message: m.Welcome, config_json: memoryview | None) -> None:
        """Get ready for the coordinator's model and tell what the devices do. Raises ModelError."""
        raw = parse_json_object(bytes(config_json or b""), "the coordinator's config.json")
        config = parse_config(raw)
        limits = BatchLimits(message.max_batch_sequences, message.max_batch_tokens, message.prefill_chunk_tokens)
        dtype = parse_dtype(message.dtype)
        model = ModelSetup(message.model_name, message.data, config, dtype, message.max_context_tokens, limits)
        cache = self._options.cache_dir
        self._store = self._backend.weights(
            config, self._fetcher.fetch, None if cache is None else cache / message.data
        )
        measured = None if self._options.state_dir is None else self._options.state_dir / "layer-times.json"
        for host in self._hosts.values():
            await host.prepare(model, self._post, self._lasting)
            assert host.runtime is not None
            host.runtime.incarnation = self.link.incarnation
            times = await host.measure(measured)
            host.runtime.gauge = SpeedGauge(times)
            self._post.to_coordinator(
                m.Measured(
                    host.setup.node, list(times.prompt_layer_time_s), list(times.decode_layer_time_s)
                )
            )  # fmt: skip
        self._measured.set()

    async def on_message(self, message: m.Message, frame: Frame) -> None:
        """A message from the coordinator, after the welcome."""
        match message:
            case m.Feed() | m.Open() | m.Close():
                if self._shaping is None:
                    self._on_sequence(message, frame.payload)
                else:
                    size_bytes = 0 if frame.payload is None else frame.payload.nbytes
                    self._shaping.inward(size_bytes, lambda: self._on_sequence(message, frame.payload))
            case m.EpochPush():
                self._spawn(f"epoch {message.epoch}", self._follow, message)
            case m.EpochRetire():
                self._spawn(f"retire below {message.epoch}", self._retire, Epoch(message.epoch))
            case m.Measure():
                self._spawn(f"measure {message.node} again", self._measure_again, NodeId(message.node))
            case m.Probe():
                self._spawn(f"probe {message.peer}", self._probe, message)
            case m.Fetched():
                self._fetcher.on_fetched(message, frame.payload)
            case m.Left():
                self.left.set()
            case _:
                logs.event(log, logging.WARNING, "message_ignored", peer=self.link.peer, kind=type(message).__name__)

    def _on_sequence(self, message: m.Feed | m.Open | m.Close, payload: memoryview | None) -> None:
        node = self._runtime_of(message.node)
        match message:
            case _ if node is None:
                return
            case m.Feed():
                node.on_feed(message, payload)
            case m.Open():
                node.on_open(message, payload)
            case m.Close():
                node.on_close(message)

    def on_activations(self, link: Link, message: m.Activations, payload: memoryview | None) -> str | None:
        """Rows from another worker, or from one that the coordinator relays.

        Returns what is wrong with the frame or its sender, None if it is sound.
        """
        if link.peer not in self._neighbours and not (self._relayed and link is self.link):
            return f"{link.peer} is no neighbour in any live epoch"
        node = self._runtime_of(message.node)
        return None if node is None else node.on_activations(message, payload)

    def on_link_lost(self, link: Link, reason: str) -> None:
        """A data link closed: tell the coordinator, fail what was to go over it."""
        if link.peer in self._neighbours:
            self._post.to_coordinator(m.LinkLost(link.peer, m.brief(reason)))
        self._each_runtime(lambda node: node.on_link_lost(self._post.reaches))

    def end(self) -> None:
        """The coordinator is lost: free all sequences."""
        for host in self._hosts.values():
            host.forget_epochs()

    async def _follow(self, push: m.EpochPush) -> None:
        epoch = Epoch(push.epoch)
        self._post.learn_hosts((NodeId(a.node), PeerId(a.peer)) for a in push.assignments)
        self._neighbours.update(PeerId(address.peer) for address in push.peers)
        for address in push.peers:
            if address.relay:
                self._relayed = True
                self._post.relay(PeerId(address.peer), True)
        linked = asyncio.Event()
        # A plan made for an earlier life of this worker may come before the nodes of this one are there.
        await self._measured.wait()
        for assignment in push.assignments:
            host = self._hosts.get(NodeId(assignment.node))
            if host is not None:
                self._spawn(f"load {assignment.node} for epoch {epoch}", self._load, epoch, assignment, host, linked)
        async with asyncio.TaskGroup() as dials:
            for address in push.peers:
                if address.dial and PeerId(address.peer) not in self._network.links:
                    dials.create_task(self._dial(address), name=f"dial {address.peer}")
        for address in push.peers:
            if not address.relay:
                self._post.relay(PeerId(address.peer), False)
        linked.set()

    async def _load(self, epoch: Epoch, assignment: m.Assignment, host: NodeHost, linked: asyncio.Event) -> None:
        """Load, and report ready once the links are up too (or are reported lost): then sequences may come."""
        layers = LayerRange(assignment.start, assignment.end)

        def report(state: m.NodeState, done: int, message: str = "") -> None:
            self._post.to_coordinator(
                m.EpochState(epoch, assignment.node, state, done, len(layers), m.brief(message))
            )  # fmt: skip

        loop = asyncio.get_running_loop()

        def progress(done: int, total: int) -> None:
            loop.call_soon_threadsafe(report, "loading", done)

        assert self._store is not None
        before = host.held()
        report("loading", 0)
        try:
            source = await self._store.ensure(
                layers, lambda done, total: report("loading", 0, f"fetching {done}/{total}")
            )
            await host.load(epoch, layers, assignment.kv_token_layers, source, progress)
        except HelixError as error:
            logs.event(log, logging.ERROR, "epoch_failed", epoch=epoch, node=assignment.node, reason=str(error))
            report("failed", 0, str(error))
            return
        if host.held() != before:
            logs.event(log, logging.INFO, "layers_loaded", epoch=epoch, node=assignment.node, layers=str(layers))
        await linked.wait()
        report("ready", len(layers))

    async def _measure_again(self, node: NodeId) -> None:
        """Tell what an idle device does now; one that serves shows it at work."""
        await self._measured.wait()
        host = self._hosts.get(node)
        if host is None or not await host.clear():
            return
        try:
            times = await host.measure(None)
        except DeviceFailed as error:
            logs.event(log, logging.WARNING, "not_measured_again", node=node, reason=str(error))
            return
        assert host.runtime is not None
        host.runtime.gauge = SpeedGauge(times)
        self._post.to_coordinator(m.Measured(node, list(times.prompt_layer_time_s), list(times.decode_layer_time_s)))

    async def _retire(self, epoch: Epoch) -> None:
        for host in self._hosts.values():
            await host.retire_below(epoch)

    async def _dial(self, address: m.PeerAddress) -> None:
        try:
            await self._network.dial(
                address.host, address.port, self._options.dial_timeout_s, PeerId(address.peer)
            )  # fmt: skip
        except HelixError as error:
            # It may have dialled us meanwhile, which we are perhaps the only one of the two to be unable to.
            if PeerId(address.peer) not in self._network.links:
                self._post.to_coordinator(m.LinkLost(address.peer, m.brief(str(error))))

    async def _probe(self, request: m.Probe) -> None:
        peer = PeerId(request.peer)
        if self._shaping is not None:
            self._post.to_coordinator(self._as_shaped(peer))
            return
        async with self._one_probe:
            try:
                link = self._network.links.get(peer)
                dialled = link is None
                if link is None:
                    link = await self._network.dial(request.host, request.port, self._options.dial_timeout_s, peer)
                found = await link.probe(request.max_bytes, self._options.probe_timeout_s)
            except (HelixError, ValueError) as error:
                self._post.to_coordinator(m.Probed(peer, 0.0, 0.0, m.brief(str(error)) or "failed"))
                return
        self._post.to_coordinator(m.Probed(peer, found.rtt_s, found.bandwidth_bytes_per_s, ""))
        if dialled:
            # Closed at once, a link could vanish under a peer that hears of the next plan before we do.
            await asyncio.sleep(LINGER_S)
            if peer not in self._neighbours:
                await link.close("probed; no epoch needs this link yet")

    def _as_shaped(self, peer: PeerId) -> m.Probed:
        """What a probe would find; an emulated worker has one node, of its own name."""
        assert self._shaping is not None
        found = self._shaping.figures(None if peer == self.link.peer else NodeId(peer))
        if found is None:
            return m.Probed(peer, 0.0, 0.0, "no such link in the cluster file")
        return m.Probed(peer, found.rtt_s, found.bandwidth_bytes_per_s, "")

    def _runtime_of(self, name: str) -> NodeRuntime | None:
        host = self._hosts.get(NodeId(name))
        return None if host is None else host.runtime

    def _each_runtime(self, act: Callable[[NodeRuntime], None]) -> None:
        for host in self._hosts.values():
            if host.runtime is not None:
                act(host.runtime)

    def _spawn(
        self, name: str, work: Callable[P, Coroutine[None, None, None]], *args: P.args, **more: P.kwargs
    ) -> None:
        self._tasks.create_task(self._unless_lost(work, *args, **more), name=name)

    async def _unless_lost(
        self, work: Callable[P, Coroutine[None, None, None]], *args: P.args, **more: P.kwargs
    ) -> None:  # fmt: skip
        try:
            await work(*args, **more)
        except PeerLost as error:
            logs.event(log, logging.WARNING, "peer_lost", peer=error.peer, reason=error.reason)
