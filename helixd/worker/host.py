"""One device of this daemon: its threads, its engine, its runtime; prepares, measures, loads and unloads.

Loading runs in a thread of its own so that it never pauses sequences that are being served. Decides nothing about
plans: the session says what to hold.
"""

import asyncio
from collections.abc import Callable
from pathlib import Path

from helixd.engine.types import LayerTimes
from helixd.errors import DeviceFailed, HelixError
from helixd.ids import Epoch
from helixd.layers import LayerRange
from helixd.model.sizes import layer_bytes
from helixd.model.weights import WeightSource
from helixd.worker.backend import Backend, ModelSetup, NodeSetup, StageEngine
from helixd.worker.node import NodeRuntime, Post
from helixd.worker.threads import ComputeThread


class NobodyWaits(Exception):
    """Ends a load in its thread when the session that wanted it is over; nobody sees it."""


class NodeHost:
    """The one owner of a device. `loading`: how many of how many parts of a range are loaded; None: nothing loads."""

    def __init__(self, setup: NodeSetup, backend: Backend) -> None:
        self.setup = setup
        self.model: ModelSetup | None = None
        self.runtime: NodeRuntime | None = None
        self.weight_bytes_loaded = 0
        self.loading: tuple[int, int] | None = None
        self._backend = backend
        self._thread = ComputeThread(f"compute-{setup.node}")
        self._loader = ComputeThread(f"load-{setup.node}")
        self._engine: StageEngine | None = None
        self._ranges: dict[Epoch, LayerRange] = {}
        self._live_from = Epoch(0)
        self._loop_task: asyncio.Task[None] | None = None
        self._loading = asyncio.Lock()

    @property
    def engine(self) -> StageEngine:
        """The engine; there is one once the node is prepared."""
        assert self._engine is not None
        return self._engine

    def held(self) -> list[tuple[int, int]]:
        """Loaded layers as maximal half-open ranges."""
        layers = sorted(self._engine.loaded) if self._engine is not None else []
        ranges: list[tuple[int, int]] = []
        for layer in layers:
            if ranges and ranges[-1][1] == layer:
                ranges[-1] = (ranges[-1][0], layer + 1)
            else:
                ranges.append((layer, layer + 1))
        return ranges

    async def prepare(self, model: ModelSetup, post: Post, tasks: asyncio.TaskGroup) -> None:
        """Make an engine for the model, or keep the one there is if it computes the same; batch as `model` says.

        Raises DeviceFailed.
        """
        if self.runtime is not None and self.model is not None and _computes_alike(self.model, model):
            self.model, self.runtime.limits = model, model.limits
            return
        if self._loop_task is not None:
            self._loop_task.cancel()
        # A session may end before the engine is there: then there is none, for no model.
        self.model = self.runtime = self._engine = None
        self._ranges.clear()
        try:
            compute = await self._thread.run(self._backend.compute, self.setup, model)
        except (MemoryError, RuntimeError) as error:
            raise self._failed("prepared", error) from error
        self._engine = compute.engine
        self.runtime = NodeRuntime(
            self.setup.node, self._thread, compute, model.limits, post, model.max_context_tokens
        )  # fmt: skip
        self._loop_task = tasks.create_task(self.runtime.run(), name=f"node {self.setup.node}")
        self.model = model

    def _failed(self, what: str, error: Exception) -> DeviceFailed:
        # Torch's own words go on for lines about its allocator.
        said = str(error).partition("\n")[0][:300] or type(error).__name__
        return DeviceFailed(
            f"node {self.setup.node}: {self.setup.device} failed while it was {what}: {said}; see what else uses the "
            "device, lower device.memory, or name other devices in device.devices"
        )

    async def measure(self, cache: Path | None) -> LayerTimes:
        """Layer times of this device for the prepared model. Raises DeviceFailed."""
        assert self.model is not None
        try:
            return await self._thread.run(self._backend.measure, self.setup, self.model, cache)
        except (MemoryError, RuntimeError) as error:
            raise self._failed("measured", error) from error

    async def clear(self) -> bool:
        """Give up layers and KV that no live epoch wants; False if one does."""
        async with self._loading:
            if self._ranges or self.runtime is None or self.runtime.open_sequences:
                return False
            await self._prune(set())
            await self._thread.run(self.engine.set_kv_capacity, 0)
        return True

    async def load(
        self, epoch: Epoch, layers: LayerRange, kv_token_layers: int, source: WeightSource,
        progress: Callable[[int, int], None],
    ) -> None:  # fmt: skip
        """Hold `layers` for `epoch`, beside what is held already, and offer `kv_token_layers` of KV.

        An epoch that was retired before its turn came, or while it loaded, is not served.

        Raises ModelError (bad weights), HelixError (no memory, with the sum; files that cannot be read).
        """
        assert self.model is not None
        assert self.runtime is not None
        async with self._loading:
            if epoch < self._live_from:
                return
            # What a session that is over was loading ends with the part that it is at.
            await self._loader.run(lambda: None)
            await self._prune({*self._held_by_epochs(), *layers.layers()})
            before = self.engine.loaded
            waited_for = True

            def tell(done: int, total: int) -> None:
                if not waited_for:
                    raise NobodyWaits
                self.loading = done, total
                progress(done, total)

            try:
                # What KV gives up now is what the plan takes for layers.
                if kv_token_layers < self.engine.kv_capacity_token_layers:
                    await self._thread.run(self.engine.set_kv_capacity, kv_token_layers)
                await self._loader.run(
                    self.engine.load, layers, source, embedding=layers.start == 0,
                    head=layers.end == self.model.config.num_layers, progress=tell,
                )  # fmt: skip
                await self._thread.run(self.engine.set_kv_capacity, kv_token_layers)
                await self._loader.run(self._backend.trim)
            except OSError as error:
                raise HelixError(
                    f"node {self.setup.node} could not read layers {layers}: {error}; is the model's disk still there?"
                ) from error
            except (MemoryError, RuntimeError) as error:
                raise HelixError(
                    f"node {self.setup.node} could not load layers {layers} on {self.setup.device}: {error}; "
                    f"lower device.memory (now {self.setup.memory_budget_bytes / 2**30:.2f} GiB)"
                ) from error
            finally:
                waited_for = False
                self.loading = None
            sizes = layer_bytes(self.model.config, self.model.dtype)
            self.weight_bytes_loaded += sum(sizes[layer] for layer in self.engine.loaded - before)
            if epoch < self._live_from:
                if self._ranges:
                    await self._prune(self._held_by_epochs())
                return
            self._ranges[epoch] = layers
        self.runtime.serve_epoch(epoch, layers)

    async def retire_below(self, epoch: Epoch) -> None:
        """Drop the epochs below `epoch`, and the layers that no later epoch holds."""
        self._live_from = max(self._live_from, epoch)
        self._ranges = {e: layers for e, layers in self._ranges.items() if e >= epoch}
        if self.runtime is None:
            return
        self.runtime.retire_below(epoch)
        async with self._loading:
            if self._ranges:
                await self._prune(self._held_by_epochs())

    def forget_epochs(self) -> None:
        """The coordinator is gone and its epochs with it; the layers stay, for the next one may want them."""
        self._ranges.clear()
        self._live_from = Epoch(0)
        if self.runtime is not None:
            self.runtime.forget_all()

    def _held_by_epochs(self) -> set[int]:
        return {layer for layers in self._ranges.values() for layer in layers.layers()}

    async def _prune(self, needed: set[int]) -> None:
        """Unload what is not needed, once nothing computes with it any more."""
        surplus = sorted(self.engine.loaded - needed)
        if surplus and self.runtime is not None:
            await self.runtime.settled()
        for layer in surplus:
            await self._thread.run(self.engine.unload, LayerRange(layer, layer + 1))

    def close(self) -> None:
        """Stop the threads once their running calls end."""
        self._thread.close()
        self._loader.close()


def _computes_alike(one: ModelSetup, other: ModelSetup) -> bool:
    return (one.fingerprint, one.dtype, one.max_context_tokens) == (
        other.fingerprint, other.dtype, other.max_context_tokens,
    )  # fmt: skip
