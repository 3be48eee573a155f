"""The parts of a daemon: which there are for a role, and how they are tied together.

The only place that knows every room; those that need torch are not entered where no device computes with it. Binds
what listens and starts what serves; when it ends and why is the business of `helixd.daemon`.
"""

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from functools import partial
from ssl import SSLContext
from typing import Any

from aiohttp import web
from prometheus_client import CollectorRegistry

from helixd import logs
from helixd.api.server import Bound, create_app, serve
from helixd.api.state import STATE
from helixd.api.text import TextTools
from helixd.config import Config
from helixd.config.checks import passed_in
from helixd.config.reload import Reload, reloaded
from helixd.coordinator.coordinator import Coordinator
from helixd.coordinator.figures import CoordinatorFigures
from helixd.emulation.cluster import PREFIX as EMULATED
from helixd.emulation.cluster import emulated_device
from helixd.emulation.links import ShapedLinks
from helixd.errors import ConfigError
from helixd.ids import NodeId, PeerId
from helixd.model.checkpoint import Checkpoint, resolve_model
from helixd.settings import (
    api_options,
    api_pair,
    coordinator_options,
    digest_cache,
    peer_tls,
    served_model,
    wire_options,
)
from helixd.state import StateDir
from helixd.tls import KeyPair, PeerTls, api_context
from helixd.wire.endpoint import Endpoint
from helixd.wire.handshake import read_secret
from helixd.wire.link import Link
from helixd.wire.memory import connect_in_process
from helixd.wire.peers import PeerIdentity
from helixd.worker.backend import Backend, NodeSetup
from helixd.worker.local_copy import LocalDigests
from helixd.worker.shaping import Shaping
from helixd.worker.worker import Worker, WorkerOptions

log = logging.getLogger(__name__)

SNAPSHOT_TASKS = 100
"""Names of tasks told at once."""


class Daemon:
    """The parts of a running daemon."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.coordinator: Coordinator | None = None
        self.worker: Worker | None = None
        self.api: Bound | None = None
        self.draining = False
        self.loop_lag_s = 0.0
        self._app: web.Application | None = None
        self._api_tls: SSLContext | None = None
        self._peer_tls: PeerTls | None = None
        self.peer_address: tuple[str, int] | None = None

    @classmethod
    async def start(
        cls, config: Config, state: StateDir, tasks: asyncio.TaskGroup, stack: AsyncExitStack
    ) -> "Daemon":  # fmt: skip
        """Bind everything and start serving; what it opened is closed with `stack`, its tasks end with `tasks`."""
        daemon = cls(config)
        secret = None
        if config.cluster.secret_file is not None:
            path = config.cluster.secret_file
            secret = await asyncio.to_thread(read_secret, path, guarded=passed_in(path, os.environ))
        daemon._peer_tls = await asyncio.to_thread(peer_tls, config)
        checkpoint = None
        if config.model.path:
            checkpoint = await asyncio.to_thread(_open_checkpoint, config.model.path)
            stack.callback(checkpoint.close)
        hub: Endpoint | None = None
        if config.coordinates:
            assert checkpoint is not None
            hub = await daemon._start_coordinator(state, secret, checkpoint, tasks, stack)
        _warn_of_exposure(config)
        if config.computes:
            await daemon._start_worker(state, secret, checkpoint, hub, tasks, stack)
        return daemon

    async def drain(self) -> None:
        """Take nothing new; return when nothing runs here any more, or the time for it is over."""
        self.draining = True
        limit_s = self.config.cluster.timers.drain_s
        if self.coordinator is not None:
            await self.coordinator.drain(limit_s)
        elif self.worker is not None:
            await self.worker.leave("the worker is stopping", limit_s)

    def end_requests(self) -> None:
        """End what runs here without waiting for it."""
        if self.coordinator is not None:
            self.coordinator.end_requests()

    async def give_up(self, reason: str, within_s: float) -> None:
        """Stop for a fault of this machine: what runs here is moved elsewhere where that is possible, else ended."""
        self.draining = True
        if self.coordinator is not None:
            self.coordinator.end_requests()
        elif self.worker is not None:
            await self.worker.leave(reason, within_s)

    async def reload(self, new: Config, env: Mapping[str, str]) -> Reload:
        """Take from `new` what can change while the daemon runs. Raises ConfigError, and then nothing has changed."""
        change = await asyncio.to_thread(reloaded, self.config, new, env)
        api = None if self._app is None else await asyncio.to_thread(api_options, change.config, env)
        fresh = await asyncio.to_thread(self._read_certificates, change.config)
        change = self._take_certificates(change, fresh)
        # Nothing from here on can fail.
        self.config = config = change.config
        logs.setup(config.log.level, config.log.format)
        if self._app is not None and api is not None:
            self._app[STATE].reconfigure(api)
        if self.coordinator is not None:
            self.coordinator.reconfigure(coordinator_options(config))
        return change

    def _read_certificates(self, config: Config) -> PeerTls | None:
        pair, tls = api_pair(config), config.cluster.tls
        if self._api_tls is not None and pair is not None:
            api_context(pair)
        if self._peer_tls is None or tls.ca is None or tls.cert is None or tls.key is None:
            return None
        return self._peer_tls.renewed(tls.ca, KeyPair(tls.cert, tls.key))

    def _take_certificates(self, change: Reload, fresh: PeerTls | None) -> Reload:
        pair = api_pair(change.config)
        if self._api_tls is not None and pair is not None:
            pair.load_into(self._api_tls)
        if self._peer_tls is not None and fresh is not None and not self._peer_tls.take(fresh):
            return replace(change, waiting=(*change.waiting, "cluster.tls.ca"))
        return change

    def overdue(self, stood_still_s: float) -> tuple[NodeId, float] | None:
        """The device that hangs and for how long it has, in seconds; None while all is well."""
        if self.worker is None:
            return None
        return self.worker.overdue(self.config.cluster.timers.step_s, stood_still_s)

    def note_loop_lag(self, lag_s: float) -> None:
        """Publish how late the event loop was just now."""
        self.loop_lag_s = lag_s
        if self._app is not None:
            self._app[STATE].metrics.loop_lag_s.set(lag_s)

    def snapshot(self) -> dict[str, Any]:
        """What goes on here, for whoever asks with SIGUSR1: counts and names, never what clients said."""
        names = sorted(task.get_name() for task in asyncio.all_tasks())
        facts: dict[str, Any] = {
            "status": self.status, "draining": self.draining, "loop_lag_s": round(self.loop_lag_s, 3),
            "task_count": len(names), "tasks": names[:SNAPSHOT_TASKS],
        }  # fmt: skip
        if self.coordinator is not None:
            facts["requests_running"] = self.coordinator.admission.running
            facts["requests_waiting"] = self.coordinator.admission.waiting
        if self.worker is not None:
            facts["queues"] = [
                f"{node}: {host.runtime.open_sequences} sequences, {host.runtime.queued_tokens} tokens queued,"
                f" {host.engine.kv_pages_used} KV pages"
                for node, host in self.worker.hosts.items()
                if host.runtime is not None
            ]
        return facts

    @property
    def status(self) -> str:
        """What the daemon is doing, in words."""
        said = []
        if self.coordinator is not None:
            ready = self.coordinator.readiness()
            model = self.coordinator.model_name
            said.append(f"serving {model}" if ready.ready else f"not serving {model}: {ready.message}")
            active = self.coordinator.epochs.active
            if active is not None and active.relayed:
                pairs = ", ".join(" - ".join(sorted(pair)) for pair in active.relayed)
                said.append(f"relaying {pairs}, which cannot reach each other")
        if self.worker is not None:
            said.append(self.worker.status)
        return f"{'draining; ' if self.draining else ''}{'; '.join(said)}"

    async def _start_coordinator(
        self, state: StateDir, secret: bytes | None, checkpoint: Checkpoint, tasks: asyncio.TaskGroup,
        stack: AsyncExitStack,
    ) -> Endpoint:  # fmt: skip
        config = self.config
        parts: list[Coordinator] = []
        identity = PeerIdentity(state.peer, state.incarnation)
        endpoint = Endpoint(
            identity, wire_options(config), secret, lambda peer, incarnation: None,
            lambda link: parts[0].on_link(link), lambda link, reason: parts[0].on_lost(link, reason),
            self._certified(state.peer),
        )  # fmt: skip
        coordinator = Coordinator(
            tasks, endpoint, served_model(config, checkpoint), coordinator_options(config), state.epoch,
            state.remember_epoch,
        )  # fmt: skip
        parts.append(coordinator)
        self.coordinator = coordinator
        await stack.enter_async_context(_open_endpoint(endpoint))
        self.peer_address = await _listen(endpoint, config)
        listen = config.api.listen
        tools = TextTools(checkpoint.tokenizer, checkpoint.chat_template, checkpoint.config.vocab_size)
        options = await asyncio.to_thread(api_options, config, os.environ)
        registry = CollectorRegistry()
        registry.register(CoordinatorFigures(coordinator, lambda: state.write_errors))
        self._app = app = create_app(coordinator, tools, options, registry)
        pair = api_pair(config)
        if pair is not None:
            self._api_tls = await asyncio.to_thread(api_context, pair)
        try:
            serving = serve(app, listen.host, listen.port, ssl_context=self._api_tls)
            self.api = await stack.enter_async_context(serving)
        except OSError as error:
            raise ConfigError(cannot_listen("api.listen", "--listen", listen.host, listen.port, error)) from error
        coordinator.start()
        logs.event(
            log, logging.INFO, "serving", model=coordinator.model_name, api=self.api.url,
            peers="{}:{}".format(*self.peer_address), peer=state.peer, epoch=state.epoch,
        )  # fmt: skip
        return endpoint

    def _certified(self, peer: PeerId) -> PeerTls | None:
        tls = self._peer_tls
        if tls is not None and peer not in tls.names:
            raise ConfigError(
                f"cluster.tls.cert speaks for {', '.join(sorted(tls.names)) or 'nobody'}, but this daemon is {peer};"
                " set node.id, or have that name put into the certificate's subjectAltName"
            )
        return tls

    async def _start_worker(
        self, state: StateDir, secret: bytes | None, checkpoint: Checkpoint | None, hub: Endpoint | None,
        tasks: asyncio.TaskGroup, stack: AsyncExitStack,
    ) -> None:  # fmt: skip
        config = self.config
        parts: list[Worker] = []
        # Inside a coordinator's process the worker is a peer of its own, linked without a socket.
        peer = state.peer if hub is None else PeerId(f"{state.peer}-worker")
        endpoint = Endpoint(
            PeerIdentity(peer, state.incarnation), wire_options(config), secret, lambda peer, incarnation: None,
            lambda link: parts[0].on_link(link), lambda link, reason: parts[0].on_lost(link, reason),
            self._certified(peer),
        )  # fmt: skip
        advertise = config.cluster.advertise if hub is None else None
        host, port = config.cluster.listen.host, config.cluster.listen.port if hub is None else 0

        async def connect() -> Link:
            if hub is not None:
                return endpoint.links.get(hub.identity.peer) or connect_in_process(endpoint, hub)
            address = config.cluster.coordinator
            assert address is not None
            return await endpoint.dial(address.host, address.port, WorkerOptions().dial_timeout_s)

        await stack.enter_async_context(_open_endpoint(endpoint))
        bound = await _listen(endpoint, config, (host, port))
        if self.peer_address is None:
            self.peer_address = bound
        # A coordinator's own worker reads the very files that the coordinator serves.
        copy = None if checkpoint is None or hub is not None else LocalDigests(checkpoint.index, digest_cache(config))
        options = WorkerOptions(
            name=config.node.name,
            advertise=advertise.host if advertise is not None else "",
            port=advertise.port if advertise is not None and advertise.port else bound[1],
            local_fingerprint=checkpoint.fingerprint if copy is not None and checkpoint is not None else "",
            local_digests=None if copy is None else copy.digests,
            state_dir=config.node.state_dir, cache_dir=config.node.cache_dir / "weights",
            retry_max_s=config.cluster.timers.join_retry_max_s,
        )  # fmt: skip
        setups, backend, shape = await asyncio.to_thread(_devices, config, peer, checkpoint, copy)
        worker = Worker(endpoint, connect, setups, options, backend, shape)
        parts.append(worker)
        self.worker = worker
        running = tasks.create_task(worker.run(), name="worker")
        # Before its endpoint closes: a worker whose links go away would try to join again.
        stack.push_async_callback(_end, running)
        for setup in setups:
            logs.event(
                log, logging.INFO, "node", node=setup.node, device=setup.device, name=setup.device_name,
                memory_mib=round(setup.memory_budget_bytes / 2**20),
            )  # fmt: skip


def _devices(
    config: Config, peer: PeerId, checkpoint: Checkpoint | None, copy: LocalDigests | None
) -> tuple[list[NodeSetup], Backend, Callable[[Callable[[], None]], Shaping] | None]:
    """This worker's nodes, what computes for them, what shapes their links. Blocking.

    torch is imported here, and only for devices that compute with it.
    """
    device, emulation = config.device, config.emulation
    named = emulated_devices(config)
    if named:
        if len(device.devices) > 1:
            raise ConfigError(f"device.devices: {named[0]} is a worker of its own; start one process for each device")
        emulated = emulated_device(
            peer, named[0], emulation.cluster_file, device.memory_bytes, emulation.time_scale
        )  # fmt: skip
        shape = partial(ShapedLinks, emulated.cluster, emulated.setup.node, emulation.time_scale)
        return [emulated.setup], emulated.backend, shape
    from helixd.worker.devices import node_setups
    from helixd.worker.torch_backend import TorchBackend
    from helixd.worker.weights import LocalStore

    setups = node_setups(peer, device.devices, device.memory_bytes, device.threads)
    digests = None if copy is None else copy.digests
    return setups, TorchBackend(LocalStore(checkpoint.index, digests) if checkpoint is not None else None), None


def emulated_devices(config: Config) -> list[str]:
    """The configured devices that only take the time."""
    return [name for name in config.device.devices if name.startswith(EMULATED)]


def _warn_of_exposure(config: Config) -> None:
    cluster = config.cluster
    if cluster.listen.loopback or cluster.tls.on:
        return
    name = "cluster_open" if cluster.secret_file is None else "cluster_not_encrypted"
    logs.event(log, logging.WARNING, name, listen=str(cluster.listen))


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait({task})


@asynccontextmanager
async def _open_endpoint(endpoint: Endpoint) -> AsyncIterator[Endpoint]:
    async with endpoint:
        yield endpoint


async def _listen(endpoint: Endpoint, config: Config, address: tuple[str, int] | None = None) -> tuple[str, int]:
    host, port = address or (config.cluster.listen.host, config.cluster.listen.port)
    try:
        return await endpoint.listen(host, port)
    except OSError as error:
        raise ConfigError(cannot_listen("cluster.listen", "--peer-listen", host, port, error)) from error


def cannot_listen(key: str, flag: str, host: str, port: int, error: OSError) -> str:
    """Why an address cannot be had, and what to do."""
    # A resolver's numbers are below 0, and its own.
    why = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror or str(error)
    return f"{key} = {host}:{port}: {why}; give another address with {flag} HOST:PORT"


def _open_checkpoint(path: str) -> Checkpoint:
    """Blocking: reads headers, compiles the tokenizer and the template."""
    checkpoint = Checkpoint.open(resolve_model(path))
    try:
        _ = checkpoint.tokenizer, checkpoint.chat_template, checkpoint.eos_ids
    except BaseException:
        checkpoint.close()
        raise
    return checkpoint
