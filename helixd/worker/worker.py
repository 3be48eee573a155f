"""The worker role: join the coordinator, serve a session, rejoin when it is lost, leave when told to.

Weights and measurements stay in memory between sessions; sequences do not. Joining is retried for ever with jittered
backoff, except when the coordinator refuses for good (wrong secret, wrong version, wrong model): then `run` raises.
"""

import asyncio
import importlib.metadata
import logging
import random
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

import helixd
from helixd import logs
from helixd.errors import JoinRefused, PeerLost
from helixd.ids import NodeId
from helixd.model.digests import WeightDigests
from helixd.protocol import messages as m
from helixd.protocol.codec import ProtocolError, from_frame, to_frame
from helixd.protocol.versions import OLDEST_VERSION, PROTOCOL_VERSION
from helixd.wire.link import Frame, Link
from helixd.wire.peers import PeerNetwork
from helixd.worker.backend import Backend, NodeSetup
from helixd.worker.host import NodeHost
from helixd.worker.node import NodeRuntime
from helixd.worker.post import PostOffice
from helixd.worker.session import Session
from helixd.worker.shaping import Shaping

log = logging.getLogger(__name__)


Connect = Callable[[], Awaitable[Link]]
"""Makes a link to the coordinator. Raises PeerLost (try again), or another HelixError (do not)."""


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """Settings of a worker. `name`: for people. `local_fingerprint`: of the local checkpoint, "" without one.

    `local_digests`: those of its weights, once they are computed; None: they are not compared.
    """

    name: str = ""
    advertise: str = ""
    port: int = 0
    local_fingerprint: str = ""
    local_digests: Callable[[], Awaitable[WeightDigests]] | None = None
    state_dir: Path | None = None
    cache_dir: Path | None = None
    dial_timeout_s: float = 5.0
    welcome_timeout_s: float = 30.0
    fetch_timeout_s: float = 30.0
    probe_timeout_s: float = 20.0
    status_interval_s: float = 1.0
    retry_min_s: float = 0.2
    retry_max_s: float = 5.0


class Worker:
    """One worker daemon: its devices, its links, its current session.

    `shape`: makes what holds messages back, given what to call when a link has drained.
    """

    def __init__(
        self, network: PeerNetwork, connect: Connect, nodes: Sequence[NodeSetup], options: WorkerOptions,
        backend: Backend, shape: Callable[[Callable[[], None]], Shaping] | None = None,
    ) -> None:  # fmt: skip
        self.hosts = {setup.node: NodeHost(setup, backend) for setup in nodes}
        self._network = network
        self._connect = connect
        self._options = options
        self._backend = backend
        self._shaping = None if shape is None else shape(self._wake_all)
        self._session: Session | None = None
        self._post: PostOffice | None = None
        self._answer: asyncio.Future[tuple[m.Message, Frame]] | None = None
        self._coordinator: Link | None = None
        self._loop_lag_s = 0.0
        self._leaving = False

    @property
    def joined(self) -> bool:
        """Whether a coordinator has welcomed this worker."""
        return self._session is not None

    @property
    def status(self) -> str:
        """What this worker is doing, in words."""
        if self._session is None:
            return "leaving" if self._leaving else "looking for a coordinator"
        return f"joined {self._session.link.peer}; {', '.join(map(_of_host, self.hosts.values()))}"

    def overdue(self, limit_s: float, stood_still_s: float = 0.0) -> tuple[NodeId, float] | None:
        """The first device that hangs, with its step's age in seconds; None while all is well.

        `stood_still_s`: for how long just now the whole process could not run.
        """
        for node, host in self.hosts.items():
            if host.runtime is not None:
                host.runtime.excuse(stood_still_s)
                age_s = host.runtime.overdue(limit_s)
                if age_s is not None:
                    return node, age_s
        return None

    # -- the network's hooks -----------------------------------------------------------------------------------------

    def on_link(self, link: Link) -> Callable[[Link, Frame], Coroutine[None, None, None]]:
        """A link is up (dialled or accepted); frames go to the handler that is returned."""
        if self._post is not None:
            self._post.add_link(link)
        return self._on_frame

    def on_lost(self, link: Link, reason: str) -> None:
        """A link closed."""
        if self._post is not None:
            self._post.drop_link(link)
        if self._answer is not None and not self._answer.done() and link is self._coordinator:
            self._answer.set_exception(PeerLost(link.peer, reason))
        if self._session is not None:
            if link is self._session.link:
                self._session.left.set()
            else:
                self._session.on_link_lost(link, reason)

    async def _on_frame(self, link: Link, frame: Frame) -> None:
        message = from_frame(frame)
        if isinstance(message, m.Activations):
            if self._session is not None:
                wrong = self._session.on_activations(link, message, frame.payload)
                if wrong is not None:
                    logs.event(log, logging.WARNING, "frame_dropped", peer=link.peer, reason=wrong)
            return
        if link is not self._coordinator:
            raise ProtocolError(f"{link.peer} is not the coordinator and sent {type(message).__name__}")
        if self._answer is not None and not self._answer.done():
            self._answer.set_result((message, frame))
        elif self._session is not None:
            await self._session.on_message(message, frame)

    # -- life --------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve until cancelled or released by `leave`. Raises JoinRefused, or the network's own rejection."""
        try:
            async with asyncio.TaskGroup() as tasks:
                self._post = PostOffice(
                    self._network.identity.peer, tasks, self._deliver_here, self._wake_all, self._shaping
                )
                tasks.create_task(self._report_status(), name="node status")
                await self._join_for_ever(tasks)
                raise SessionOver
        except* SessionOver:
            pass
        finally:
            for host in self.hosts.values():
                host.close()

    async def leave(self, reason: str, timeout_s: float) -> None:
        """Ask the coordinator to move everything elsewhere; returns when it has, or after `timeout_s`."""
        self._leaving = True
        session = self._session
        if session is None or self._post is None:
            return
        self._post.to_coordinator(m.Leave(m.brief(reason)))
        try:
            async with asyncio.timeout(timeout_s):
                await session.left.wait()
        except TimeoutError:
            logs.event(log, logging.WARNING, "not_released", coordinator=session.link.peer, limit_s=timeout_s)

    async def _join_for_ever(self, lasting: asyncio.TaskGroup) -> None:
        backoff_s = self._options.retry_min_s
        while not self._leaving:
            try:
                link, welcome, frame = await self._join()
            except PeerLost as error:
                logs.event(log, logging.INFO, "join_failed", reason=str(error), retry_s=round(backoff_s, 1))
            else:
                began_s = time.monotonic()
                await self._serve(link, welcome, frame, lasting)
                if time.monotonic() - began_s > self._options.retry_max_s:
                    backoff_s = self._options.retry_min_s
                    continue
                # A session that ends as soon as it begins is as good as none.
            if not self._leaving:
                await asyncio.sleep(backoff_s * random.uniform(0.7, 1.3))  # noqa: S311 - jitter, not a secret
                backoff_s = min(self._options.retry_max_s, backoff_s * 1.7)

    async def _join(self) -> tuple[Link, m.Welcome, Frame]:
        options = self._options
        digests = None if options.local_digests is None else (await options.local_digests()).packed()
        link = await self._connect()
        self._coordinator = link
        self._answer = asyncio.get_running_loop().create_future()
        try:
            await link.send(to_frame(self._hello(), None if digests is None else memoryview(digests)))
            async with asyncio.timeout(options.welcome_timeout_s):
                message, frame = await self._answer
        except TimeoutError:
            await link.close("no welcome")
            raise PeerLost(link.peer, f"no welcome within {options.welcome_timeout_s:g} s") from None
        finally:
            self._answer = None
        match message:
            case m.Welcome():
                return link, message, frame
            case m.Refused(final=True):
                await link.close("refused")
                raise JoinRefused(f"coordinator {link.peer} refuses this worker ({message.code}): {message.message}")
            case m.Refused():
                await link.close("refused for now")
                raise PeerLost(link.peer, f"refused for now ({message.code}): {message.message}")
            case _:
                await link.close("protocol")
                raise PeerLost(link.peer, f"answered hello with {type(message).__name__}")

    async def _serve(self, link: Link, welcome: m.Welcome, frame: Frame, lasting: asyncio.TaskGroup) -> None:
        assert self._post is not None
        try:
            async with asyncio.TaskGroup() as tasks:
                session = Session(
                    link,
                    self._network,
                    self.hosts,
                    self._post,
                    tasks,
                    lasting,
                    self._options,
                    self._backend,
                    self._shaping,
                )
                self._session = session
                self._post.set_coordinator(link.peer)
                logs.event(log, logging.INFO, "joined", coordinator=link.peer, model=welcome.model_name)
                tasks.create_task(session.welcome(welcome, frame.payload), name="welcome")
                if link.closed is None:
                    await session.left.wait()
                raise SessionOver
        except* SessionOver:
            pass
        finally:
            self._session = None
            self._post.set_coordinator(None)
            session.end()
        if link.closed is None:
            await link.close("left")
        level = logging.INFO if self._leaving else logging.WARNING
        logs.event(log, level, "session_over", coordinator=link.peer, reason=link.closed)
        _raise_if_cancelled()

    def _hello(self) -> m.Hello:
        nodes = [
            m.NodeHardware(
                s.node, s.device, s.device_name, s.memory_total_bytes, s.memory_budget_bytes
            )
            for s in (host.setup for host in self.hosts.values())
        ]  # fmt: skip
        held = [(str(host.setup.node), *span) for host in self.hosts.values() for span in host.held()]
        models = {host.model.fingerprint for host in self.hosts.values() if host.model is not None}
        software = f"helixd {helixd.__version__} python {sys.version.split()[0]} torch {_torch_version()}"
        return m.Hello(
            PROTOCOL_VERSION, nodes, self._options.local_fingerprint, self._options.advertise, self._options.port,
            software, models.pop() if models else "", held, self._options.name[:256],
            OLDEST_VERSION,
        )  # fmt: skip

    def _deliver_here(self, node: NodeId, message: m.Activations, payload: memoryview) -> None:
        runtime = self.hosts[node].runtime
        if runtime is not None:
            runtime.on_activations(message, payload)

    def _wake_all(self) -> None:
        for host in self.hosts.values():
            if host.runtime is not None:
                host.runtime.wake()

    async def _report_status(self) -> None:
        process = psutil.Process()
        while True:
            before = time.monotonic()
            await asyncio.sleep(self._options.status_interval_s)
            self._loop_lag_s = max(0.0, time.monotonic() - before - self._options.status_interval_s)
            for host in self.hosts.values():
                if host.runtime is not None:
                    host.runtime.tidy()
            if self._session is None or self._post is None:
                continue
            paths = self._post.paths()
            for host in self.hosts.values():
                if host.runtime is not None:
                    self._post.to_coordinator(self._status_of(host, host.runtime, process, paths))
                    paths = []

    def _status_of(
        self, host: NodeHost, runtime: NodeRuntime, process: psutil.Process, paths: list[m.PathSeen]
    ) -> m.NodeStatus:
        engine = host.engine
        slower = runtime.slowdown()
        return m.NodeStatus(
            node=host.setup.node,
            steps_done=runtime.steps_done,
            oldest_work_age_s=runtime.oldest_work_age_s(),
            queued_tokens=runtime.queued_tokens,
            open_sequences=runtime.open_sequences,
            kv_used_token_layers=engine.kv_used_token_layers,
            kv_capacity_token_layers=engine.kv_capacity_token_layers,
            kv_pages_used=engine.kv_pages_used,
            stale_frames=runtime.stale_frames,
            loop_lag_s=self._loop_lag_s,
            resident_bytes=process.memory_info().rss,
            weight_bytes_loaded=host.weight_bytes_loaded,
            prefill_slowdown=slower.prefill or 0.0,
            decode_slowdown=slower.decode or 0.0,
            paths=paths,
        )


class SessionOver(Exception):
    """Ends a TaskGroup whose work is done; never leaves this module."""


def _raise_if_cancelled() -> None:
    """A TaskGroup that was ending already swallows a cancellation of its task (CPython before 3.13): say it again."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


def _of_host(host: NodeHost) -> str:
    loading, held = host.loading, ", ".join(f"[{start}, {end})" for start, end in host.held())
    if loading is not None:
        return f"{host.setup.node} loading {loading[0]}/{loading[1]}"
    return f"{host.setup.node} holds layers {held}" if held else f"{host.setup.node} holds nothing"


def _torch_version() -> str:
    """Without importing it: a worker that does not compute with torch starts without it."""
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
