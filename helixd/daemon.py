"""The daemon: a configuration made into a running coordinator, worker, or both, until a signal ends it.

The only place that knows every room; those that need torch are not entered where there is no worker. Builds the parts,
starts them in one TaskGroup, drains on SIGTERM or SIGINT (a second one ends at once), and says with its exit status why
it ended.
"""

import asyncio
import importlib
import logging
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from functools import partial

from helixd import logs
from helixd.api.auth import load_keys
from helixd.api.options import ApiOptions, Limits
from helixd.api.server import Bound, create_app, serve
from helixd.api.text import TextTools
from helixd.config import Config
from helixd.coordinator.coordinator import Coordinator, CoordinatorOptions, ServedModel
from helixd.coordinator.planning import Pin, PlanningOptions
from helixd.coordinator.replanning import ReplanOptions
from helixd.emulation.cluster import PREFIX as EMULATED
from helixd.emulation.cluster import emulated_device
from helixd.emulation.links import ShapedLinks
from helixd.errors import ConfigError, HelixError, JoinRefused, ModelError
from helixd.exits import Exit
from helixd.ids import PeerId
from helixd.model.checkpoint import Checkpoint, resolve_model
from helixd.model.tokenizer import IncrementalDetokenizer
from helixd.plan.spec import WorkloadSpec
from helixd.state import StateDir, StateError
from helixd.wire.endpoint import Endpoint
from helixd.wire.errors import AuthRejected, PeerRefused, VersionMismatch
from helixd.wire.handshake import read_secret
from helixd.wire.link import Link
from helixd.wire.memory import connect_in_process
from helixd.wire.options import WireOptions
from helixd.wire.peers import PeerIdentity
from helixd.wire.tuning import install_uvloop, tune_malloc
from helixd.worker.backend import Backend, NodeSetup
from helixd.worker.shaping import Shaping
from helixd.worker.worker import Worker, WorkerOptions

log = logging.getLogger(__name__)

LEAST_KV_TOKENS = 256
LAST_WORDS_S = 1.0


class Stopped(Exception):
    """Ends the daemon's TaskGroup; never leaves this module."""


def run(config: Config) -> int:
    """Run until stopped; the exit status. Raises ConfigError and ModelError for what cannot start."""
    tune_malloc()
    install_uvloop()
    if config.computes and not _emulated(config):
        _import_torch()
    try:
        state = StateDir.open(config.node.state_dir, config.node.id)
    except StateError as error:
        logs.event(log, logging.ERROR, "state_not_usable", reason=str(error))
        return Exit.STATE_NOT_WRITABLE
    try:
        return asyncio.run(_main(config, state))
    finally:
        state.close()


def _import_torch() -> None:
    """Before the event loop runs, since it takes seconds. Ctrl-C meanwhile ends the process, without a trace."""
    interruptible = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if interruptible:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        importlib.import_module("helixd.worker.torch_backend")
    finally:
        if interruptible:
            signal.signal(signal.SIGINT, signal.default_int_handler)


async def _main(config: Config, state: StateDir) -> int:
    status = Exit.INTERNAL
    try:
        async with AsyncExitStack() as stack:
            tasks = await stack.enter_async_context(asyncio.TaskGroup())
            daemon = await Daemon.start(config, state, tasks, stack)
            with _signals() as stop:
                await stop.wait()
                stop.clear()
                logs.event(log, logging.INFO, "draining", limit_s=config.cluster.timers.drain_s)
                drain = tasks.create_task(daemon.drain(), name="drain")
                again = tasks.create_task(stop.wait(), name="second signal")
                await asyncio.wait({drain, again}, return_when=asyncio.FIRST_COMPLETED)
                if not drain.done():
                    logs.event(log, logging.WARNING, "stopped_before_drained")
                    daemon.end_requests()
                    await asyncio.wait({drain}, timeout=LAST_WORDS_S)
            raise Stopped
    except* Stopped:
        logs.event(log, logging.INFO, "stopped")
        status = Exit.OK
    except* (JoinRefused, AuthRejected, VersionMismatch, PeerRefused) as errors:
        logs.event(log, logging.ERROR, "rejected", reason=str(_first(errors)))
        status = Exit.REJECTED
    except* (ConfigError, ModelError) as errors:
        raise _first(errors) from None
    return status


class Daemon:
    """The parts of a running daemon."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.coordinator: Coordinator | None = None
        self.worker: Worker | None = None
        self.api: Bound | None = None
        self.peer_address: tuple[str, int] | None = None

    @classmethod
    async def start(
        cls, config: Config, state: StateDir, tasks: asyncio.TaskGroup, stack: AsyncExitStack
    ) -> "Daemon":  # fmt: skip
        """Bind everything and start serving; what it opened is closed with `stack`, its tasks end with `tasks`."""
        daemon = cls(config)
        secret = None
        if config.cluster.secret_file is not None:
            secret = await asyncio.to_thread(read_secret, config.cluster.secret_file)
        checkpoint = None
        if config.model.path:
            checkpoint = await asyncio.to_thread(_open_checkpoint, config.model.path)
            stack.callback(checkpoint.close)
        hub: Endpoint | None = None
        if config.coordinates:
            assert checkpoint is not None
            hub = await daemon._start_coordinator(state, secret, checkpoint, tasks, stack)
        if config.computes:
            await daemon._start_worker(state, secret, checkpoint, hub, tasks, stack)
        return daemon

    async def drain(self) -> None:
        """Take nothing new; return when nothing runs here any more, or the time for it is over."""
        limit_s = self.config.cluster.timers.drain_s
        if self.coordinator is not None:
            await self.coordinator.drain(limit_s)
        elif self.worker is not None:
            await self.worker.leave("the worker is stopping", limit_s)

    def end_requests(self) -> None:
        """End what runs here without waiting for it."""
        if self.coordinator is not None:
            self.coordinator.end_requests()

    async def _start_coordinator(
        self, state: StateDir, secret: bytes | None, checkpoint: Checkpoint, tasks: asyncio.TaskGroup,
        stack: AsyncExitStack,
    ) -> Endpoint:  # fmt: skip
        config = self.config
        parts: list[Coordinator] = []
        identity = PeerIdentity(state.peer, state.incarnation)
        endpoint = Endpoint(
            identity, _wire_options(config), secret, lambda peer, incarnation: None,
            lambda link: parts[0].on_link(link), lambda link, reason: parts[0].on_lost(link, reason),
        )  # fmt: skip
        coordinator = Coordinator(
            tasks, endpoint, _served_model(config, checkpoint), _coordinator_options(config), state.epoch,
            state.remember_epoch,
        )  # fmt: skip
        parts.append(coordinator)
        self.coordinator = coordinator
        await stack.enter_async_context(_open_endpoint(endpoint))
        self.peer_address = await _listen(endpoint, config)
        listen = config.api.listen
        tools = TextTools(checkpoint.tokenizer, checkpoint.chat_template, checkpoint.config.vocab_size)
        app = create_app(coordinator, tools, _api_options(config))
        try:
            self.api = await stack.enter_async_context(serve(app, listen.host, listen.port))
        except OSError as error:
            raise ConfigError(_cannot_listen("api.listen", "--listen", listen.host, listen.port, error)) from error
        coordinator.start()
        logs.event(
            log, logging.INFO, "serving", model=coordinator.model_name, api=self.api.url,
            peers="{}:{}".format(*self.peer_address), peer=state.peer, epoch=state.epoch,
        )  # fmt: skip
        if config.cluster.secret_file is None and not config.cluster.listen.loopback:
            logs.event(log, logging.WARNING, "cluster_open", listen=str(config.cluster.listen))
        return endpoint

    async def _start_worker(
        self, state: StateDir, secret: bytes | None, checkpoint: Checkpoint | None, hub: Endpoint | None,
        tasks: asyncio.TaskGroup, stack: AsyncExitStack,
    ) -> None:  # fmt: skip
        config = self.config
        parts: list[Worker] = []
        # Inside a coordinator's process the worker is a peer of its own, linked without a socket.
        peer = state.peer if hub is None else PeerId(f"{state.peer}-worker")
        endpoint = Endpoint(
            PeerIdentity(peer, state.incarnation), _wire_options(config), secret, lambda peer, incarnation: None,
            lambda link: parts[0].on_link(link), lambda link, reason: parts[0].on_lost(link, reason),
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
        options = WorkerOptions(
            name=config.node.name,
            advertise=advertise.host if advertise is not None else "",
            port=advertise.port if advertise is not None and advertise.port else bound[1],
            local_fingerprint=checkpoint.fingerprint if checkpoint is not None else "",
            state_dir=config.node.state_dir, cache_dir=config.node.cache_dir / "weights",
            retry_max_s=config.cluster.timers.join_retry_max_s,
        )  # fmt: skip
        setups, backend, shape = await asyncio.to_thread(_devices, config, peer, checkpoint)
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
    config: Config, peer: PeerId, checkpoint: Checkpoint | None
) -> tuple[list[NodeSetup], Backend, Callable[[Callable[[], None]], Shaping] | None]:
    """This worker's nodes, what computes for them, what shapes their links. Blocking.

    torch is imported here, and only for devices that compute with it.
    """
    device, emulation = config.device, config.emulation
    named = _emulated(config)
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
    return setups, TorchBackend(LocalStore(checkpoint.index) if checkpoint is not None else None), None


def _emulated(config: Config) -> list[str]:
    return [name for name in config.device.devices if name.startswith(EMULATED)]


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
        raise ConfigError(_cannot_listen("cluster.listen", "--peer-listen", host, port, error)) from error


def _cannot_listen(key: str, flag: str, host: str, port: int, error: OSError) -> str:
    why = os.strerror(error.errno) if error.errno else str(error)
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


def _served_model(config: Config, checkpoint: Checkpoint) -> ServedModel:
    decoder, wanted = checkpoint.config, config.model.max_context_tokens
    if wanted > decoder.max_positions:
        raise ConfigError(f"model.max_context_tokens = {wanted}, but the model has {decoder.max_positions} positions")
    tokenizer = checkpoint.tokenizer
    return ServedModel(
        name=config.model.name or checkpoint.name,
        fingerprint=checkpoint.fingerprint,
        config=decoder,
        config_text=checkpoint.config_text,
        dtype=decoder.dtype if config.model.dtype == "auto" else config.model.dtype,
        max_context_tokens=wanted or decoder.max_positions,
        eos_ids=checkpoint.eos_ids,
        index=checkpoint.index,
        new_detokenizer=lambda prompt: IncrementalDetokenizer(tokenizer, prompt),
    )


def _coordinator_options(config: Config) -> CoordinatorOptions:
    timers, planner, engine = config.cluster.timers, config.planner, config.engine
    workload = WorkloadSpec(
        mean_input_tokens=planner.mean_input_tokens, mean_output_tokens=planner.mean_output_tokens,
        min_kv_tokens=LEAST_KV_TOKENS,
    )  # fmt: skip
    pins = {
        name: Pin(pin.min_layers, pin.max_layers, pin.range, pin.exclude) for name, pin in planner.pins.items()
    }  # fmt: skip
    return CoordinatorOptions(
        queue=config.api.limits.queue,
        max_batch_sequences=engine.max_batch_sequences,
        max_batch_tokens=engine.max_batch_tokens,
        prefill_chunk_tokens=engine.prefill_chunk_tokens,
        step_s=timers.step_s,
        failover_wait_s=timers.failover_wait_s,
        max_migrations=timers.max_migrations,
        probe_bytes=config.cluster.probe_bytes,
        planning=PlanningOptions(
            planner.time_limit_s, workload, engine.kv_fraction, pins, float(planner.load_speed_bytes), planner.horizon_s
        ),
        replan=ReplanOptions(
            planner.wait_for_nodes, planner.settle_s, planner.replan_gain, planner.replan_cooldown_s
        ),
    )  # fmt: skip


def _wire_options(config: Config) -> WireOptions:
    cluster = config.cluster
    return WireOptions(
        ping_interval_s=cluster.timers.ping_s,
        dead_after_s=cluster.timers.dead_after_s,
        send_deadline_s=cluster.timers.send_s,
        chunk_bytes=cluster.chunk_bytes,
        bulk_window_bytes=cluster.window_bytes,
    )


def _api_options(config: Config) -> ApiOptions:
    api = config.api
    return ApiOptions(
        limits=Limits(n=api.limits.n),
        key_digests=load_keys(api.keys_file) if api.keys_file is not None else frozenset(),
        cors_origins=api.cors_origins,
        body_bytes=api.limits.body_bytes,
        connections=api.limits.connections,
        per_key_in_flight=api.limits.per_key_in_flight,
        request_timeout_s=api.limits.request_s,
        keep_alive_s=api.limits.keep_alive_s,
        write_stall_s=api.limits.write_stall_s,
        vllm_metric_names=config.metrics.vllm_names,
    )


@contextmanager
def _signals() -> Iterator[asyncio.Event]:
    """An event that SIGTERM and SIGINT set."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    try:
        yield stop
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


def _first(errors: BaseExceptionGroup[HelixError]) -> BaseException:
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
