"""A device over several sessions: what it keeps of the one before, and what it must not."""

import asyncio
import errno
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from helixd import daemon
from helixd.errors import DeviceFailed, HelixError
from helixd.exits import Exit
from helixd.ids import Epoch, NodeId
from helixd.layers import LayerRange
from helixd.worker.backend import ModelSetup, NodeSetup
from helixd.worker.batcher import BatchLimits
from helixd.worker.host import NodeHost
from tests.vtime.model import decoder

LAYERS = 6
LIMITS = BatchLimits(8, 64, 16)
MODEL = ModelSetup("m", "f", decoder(LAYERS), "float32", 160, LIMITS)


class ListEngine:
    """Holds layers, one after another; `gate` closed keeps it at one."""

    def __init__(self) -> None:
        self.loaded: set[int] = set()
        self.gate = threading.Event()
        self.gate.set()
        self.kv_capacity_token_layers = 0
        self.room_while_loading: list[int] = []

    def set_kv_capacity(self, token_layers: int) -> None:
        self.kv_capacity_token_layers = token_layers

    def load(self, layers: LayerRange, source: Any, progress: Callable[[int, int], None], **_: bool) -> None:
        self.room_while_loading.append(self.kv_capacity_token_layers)
        for done, layer in enumerate(layers.layers(), 1):
            assert self.gate.wait(10)
            self.loaded.add(layer)
            progress(done, len(layers))

    def unload(self, layers: LayerRange) -> None:
        self.loaded -= set(layers.layers())


class Backend:
    """Makes engines; `stuck` keeps the next one from being made."""

    def __init__(self) -> None:
        self.made: list[ModelSetup] = []
        self.stuck = threading.Event()
        self.stuck.set()

    def compute(self, setup: NodeSetup, model: ModelSetup) -> Any:
        assert self.stuck.wait(10)
        self.made.append(model)
        return SimpleNamespace(engine=ListEngine(), row_bytes=8)

    def trim(self) -> None: ...


@asynccontextmanager
async def device() -> AsyncIterator[tuple[NodeHost, Backend, Callable[[ModelSetup], Any]]]:
    backend = Backend()
    host = NodeHost(NodeSetup(NodeId("n"), "cpu", "", 1 << 30, 1 << 30), backend)  # type: ignore[arg-type]
    try:
        async with asyncio.TaskGroup() as tasks:
            yield host, backend, lambda model: host.prepare(model, SimpleNamespace(), tasks)  # type: ignore[arg-type]
            assert host._loop_task is not None
            host._loop_task.cancel()
    finally:
        host.close()


async def test_the_same_model_is_not_made_again() -> None:
    async with device() as (host, backend, prepare):
        await prepare(MODEL)
        engine = host.engine
        await prepare(replace(MODEL, name="another name"))
        assert host.engine is engine
        assert len(backend.made) == 1


@pytest.mark.parametrize("change", [{"fingerprint": "g"}, {"dtype": "bfloat16"}, {"max_context_tokens": 320}])
async def test_a_model_that_is_computed_otherwise_gets_another_engine(change: dict[str, Any]) -> None:
    async with device() as (host, backend, prepare):
        await prepare(MODEL)
        engine = host.engine
        await prepare(replace(MODEL, **change))
        assert host.engine is not engine
        assert backend.made == [MODEL, replace(MODEL, **change)]


async def test_a_coordinator_that_batches_otherwise_is_followed_without_loading_anew() -> None:
    async with device() as (host, _, prepare):
        await prepare(MODEL)
        engine = host.engine
        await prepare(replace(MODEL, limits=BatchLimits(2, 8, 4)))
        assert host.engine is engine
        assert host.runtime is not None
        assert host.runtime.limits == BatchLimits(2, 8, 4)


async def test_a_session_that_ends_while_its_engine_is_made_leaves_none_that_does_not_run() -> None:
    async with device() as (host, backend, prepare):
        await prepare(MODEL)
        other = replace(MODEL, fingerprint="g")
        backend.stuck.clear()
        first = asyncio.ensure_future(prepare(other))
        await asyncio.sleep(0.01)
        first.cancel()
        await asyncio.wait({first})
        backend.stuck.set()
        await prepare(other)
        assert host.model == other
        assert host._loop_task is not None
        await asyncio.sleep(0)
        assert not host._loop_task.cancelling()


async def test_what_a_lost_session_was_loading_is_gone_before_the_next_plan_is_loaded() -> None:
    """A thread cannot be stopped: it goes on loading for a session that is over."""
    async with device() as (host, _, prepare):
        await prepare(MODEL)
        engine: Any = host.engine
        engine.gate.clear()
        source: Any = None
        first = asyncio.ensure_future(host.load(Epoch(1), LayerRange(0, 4), 100, source, lambda done, total: None))
        await asyncio.sleep(0.01)
        first.cancel()
        await asyncio.wait({first})
        host.forget_epochs()
        second = asyncio.ensure_future(host.load(Epoch(2), LayerRange(3, 6), 100, source, lambda done, total: None))
        await asyncio.sleep(0.01)
        engine.gate.set()
        async with asyncio.timeout(5):
            await second
        assert host.held() == [(3, 6)]
        assert host.loading is None


async def test_layers_that_nobody_waits_for_any_more_are_not_all_loaded() -> None:
    """Else a daemon that is told to stop, or the next session, would wait for a whole model."""
    async with device() as (host, _, prepare):
        await prepare(MODEL)
        engine: Any = host.engine
        engine.gate.clear()
        source: Any = None
        load = asyncio.ensure_future(host.load(Epoch(1), LayerRange(0, 6), 100, source, lambda done, total: None))
        await asyncio.sleep(0.01)
        load.cancel()
        await asyncio.wait({load})
        engine.gate.set()
        await host._loader.run(lambda: None)
        assert host.held() == [(0, 1)]
        await host.load(Epoch(2), LayerRange(0, 6), 100, source, lambda done, total: None)
        assert host.held() == [(0, 6)]


async def test_kv_makes_room_before_layers_come_and_grows_once_they_are_there() -> None:
    """A device that gives all it has to KV has nothing left for what it is to hold beside."""
    async with device() as (host, _, prepare):
        await prepare(MODEL)
        engine: Any = host.engine
        source: Any = None
        for epoch, room in enumerate((100, 60, 80), 1):
            await host.load(Epoch(epoch), LayerRange(0, epoch), room, source, lambda done, total: None)
        assert engine.room_while_loading == [0, 60, 60]
        assert engine.kv_capacity_token_layers == 80


async def test_weights_that_cannot_be_read_are_a_failed_load_and_not_the_daemons_end() -> None:
    async with device() as (host, _, prepare):
        await prepare(MODEL)
        engine: Any = host.engine
        source: Any = None

        def unreadable(*_: Any, **__: Any) -> None:
            raise OSError(errno.EIO, "Input/output error", "model.safetensors")

        engine.load = unreadable
        with pytest.raises(HelixError, match=r"node n could not read layers .*Input/output error: 'model.safetensors'"):
            await host.load(Epoch(1), LayerRange(0, 2), 100, source, lambda done, total: None)
        assert host.loading is None


@pytest.mark.parametrize("error", [RuntimeError("out of memory.\nTried to allocate"), MemoryError()])
async def test_a_device_that_fails_while_it_is_prepared_or_measured_says_what_to_do(error: Exception) -> None:
    def fail(*_: object) -> Any:
        raise error

    said = str(error).partition("\n")[0] or "MemoryError"
    async with device() as (host, backend, prepare):
        await prepare(MODEL)
        backend.measure = fail  # type: ignore[attr-defined]
        with pytest.raises(DeviceFailed, match=f"^node n: cpu failed while it was measured: {said}; .* device.memory"):
            await host.measure(None)
        backend.compute = fail  # type: ignore[method-assign]
        with pytest.raises(DeviceFailed, match=f"prepared: {said}; "):
            await prepare(replace(MODEL, fingerprint="g"))
        assert host.runtime is None


async def test_a_daemon_whose_device_fails_says_so_in_a_line_and_may_be_started_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def start(*_: object) -> None:
        raise DeviceFailed("node n: cpu failed")

    monkeypatch.setattr(daemon.Daemon, "start", start)
    status = await daemon._main(SimpleNamespace(), lambda: None, SimpleNamespace(), SimpleNamespace())  # type: ignore
    assert status == Exit.INTERNAL
    assert [record.getMessage() for record in caplog.records] == ["device_failed"]
    assert not caplog.records[0].exc_info
