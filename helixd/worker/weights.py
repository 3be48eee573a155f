"""Where a worker's weights come from: a local copy of the checkpoint, or the coordinator, tensor by tensor.

Fetched tensors are kept in the cache directory, one safetensors file per layer, written whole or not at all, so that a
restart fetches nothing. Only the tensors of the ranges asked for are ever touched.
"""

import asyncio
import json
import logging
import os
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from helixd import logs
from helixd.engine.loader import TORCH_DTYPES
from helixd.errors import ModelError
from helixd.files import write_whole
from helixd.layers import LayerRange
from helixd.model.decoder import DecoderConfig, parse_dtype
from helixd.model.digests import VerifiedSource, WeightDigests, tensor_digest
from helixd.model.index import SafetensorsIndex
from helixd.model.names import TensorSpec, embedding_weights, head_weights, layer_weights
from helixd.model.weights import RawTensor, WeightSource
from helixd.worker.backend import FetchTensor

log = logging.getLogger(__name__)

_DIGESTS = "digests.json"
_FILE = "model.safetensors"


class LocalStore:
    """A checkpoint directory on this machine. With `digests`, every tensor is compared with its own as it is loaded."""

    def __init__(self, index: SafetensorsIndex, digests: Callable[[], Awaitable[WeightDigests]] | None = None) -> None:
        self._index = index
        self._digests = digests

    async def ensure(self, layers: LayerRange, progress: Callable[[int, int], None]) -> WeightSource:
        """The whole checkpoint is here."""
        return self._index if self._digests is None else VerifiedSource(self._index, await self._digests())


class FetchedStore:
    """Weights that come from the coordinator, cached by layer under `cache` (None: kept in memory only)."""

    def __init__(self, config: DecoderConfig, fetch: FetchTensor, cache: Path | None) -> None:
        self._config = config
        self._fetch = fetch
        self._cache = cache

    async def ensure(self, layers: LayerRange, progress: Callable[[int, int], None]) -> WeightSource:
        """Fetch what the cache does not have, group by group."""
        groups = list(_groups(self._config, layers))
        source = GroupedSource()
        for done, (group, specs) in enumerate(groups):
            progress(done, len(groups))
            kept = None if self._cache is None else self._cache / group
            if kept is None or not await asyncio.to_thread(_is_cached, kept, specs):
                tensors = {spec.name: await self._fetch(spec.name) for spec in specs}
                if kept is None or not await asyncio.to_thread(_write_group, kept, tensors):
                    source.add_tensors(tensors)
                    continue
            source.add_directory(kept, specs)
        return source


class GroupedSource:
    """Several cached directories and tensors in memory, as one source."""

    def __init__(self) -> None:
        self._directories: dict[str, Path] = {}
        self._tensors: dict[str, RawTensor] = {}

    def add_directory(self, directory: Path, specs: Iterable[TensorSpec]) -> None:
        """These tensors are in that cached checkpoint directory."""
        self._directories.update((spec.name, directory) for spec in specs)

    def add_tensors(self, tensors: dict[str, RawTensor]) -> None:
        """These tensors are here."""
        self._tensors.update(tensors)

    def read(self, name: str) -> RawTensor:
        """The tensor called `name`. Raises ModelError; what the cache holds damaged is then fetched the next time."""
        if name in self._tensors:
            return self._tensors[name]
        if name in self._directories:
            directory = self._directories[name]
            digests = _digests(directory)
            with SafetensorsIndex.open(directory) as index:
                raw = index.read(name)
            if tensor_digest(raw.data).hex() == digests.get(name):
                return raw
            (directory / _FILE).unlink(missing_ok=True)
            raise ModelError(f"tensor {name} is damaged in the cache; {directory} will be fetched again")
        raise ModelError(f"tensor {name} was not fetched; the coordinator's checkpoint may lack it")

    def __contains__(self, name: str) -> bool:
        return name in self._tensors or name in self._directories


def _groups(config: DecoderConfig, layers: LayerRange) -> Iterable[tuple[str, list[TensorSpec]]]:
    if layers.start == 0:
        yield "embedding", _flat(embedding_weights(config))
    for layer in layers.layers():
        yield f"layer-{layer:04d}", _flat(layer_weights(config, layer))
    if layers.end == config.num_layers:
        yield "head", _flat(head_weights(config))


def _flat(weights: dict[str, tuple[TensorSpec, ...]]) -> list[TensorSpec]:
    return [spec for parts in weights.values() for spec in parts]


def _is_cached(directory: Path, specs: list[TensorSpec]) -> bool:
    """Whether the cached group is there, whole, and of the shapes expected. Its data is looked at when it is read."""
    try:
        digests = _digests(directory)
        with SafetensorsIndex.open(directory) as index:
            return all(
                spec.name in index and index.ref(spec.name).shape == spec.shape and spec.name in digests
                for spec in specs
            )
    except (OSError, ModelError):
        return False


def _write_group(directory: Path, tensors: dict[str, RawTensor]) -> bool:
    """Write a group whole or not at all; False (and a word in the log) if the disk does not take it."""
    file = directory / _FILE
    partial = directory / f"{os.getpid()}.partial"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        save_file(
            {
                name: torch.frombuffer(raw.data, dtype=TORCH_DTYPES[parse_dtype(raw.dtype)]).view(raw.shape)
                for name, raw in tensors.items()
            },
            partial,
        )
        write_whole(
            directory / _DIGESTS, json.dumps({name: tensor_digest(raw.data).hex() for name, raw in tensors.items()})
        )
        partial.replace(file)
    except (OSError, SafetensorError) as error:
        logs.event(log, logging.WARNING, "weights_not_cached", path=str(directory), reason=str(error))
        partial.unlink(missing_ok=True)
        return False
    return True


def _digests(directory: Path) -> dict[str, str]:
    """Of the cached group's tensors, in hex, as they were when they came. Raises ModelError."""
    try:
        known = json.loads((directory / _DIGESTS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"the digests in {directory} cannot be read: {error}") from error
    return known if isinstance(known, dict) else {}
