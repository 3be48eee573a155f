"""Nodes that compute with torch on this machine's devices."""

from pathlib import Path

from helixd.engine.engine import Engine
from helixd.engine.types import EngineOptions, LayerTimes
from helixd.model.decoder import DecoderConfig
from helixd.wire.tuning import release_free_memory
from helixd.worker.backend import FetchTensor, ModelSetup, NodeSetup, WeightStore
from helixd.worker.compute import NodeCompute
from helixd.worker.measure import measured_layer_times
from helixd.worker.weights import FetchedStore


class TorchBackend:
    """See `Backend`. `local_store`: a copy of the checkpoint on this machine, None to fetch from the coordinator."""

    def __init__(self, local_store: WeightStore | None) -> None:
        self._local_store = local_store

    def compute(self, setup: NodeSetup, model: ModelSetup) -> NodeCompute:
        """See `Backend`."""
        return NodeCompute(Engine(model.config, _options(setup, model)), model.config.hidden_size, model.dtype)

    def measure(self, setup: NodeSetup, model: ModelSetup, cache: Path | None) -> LayerTimes:
        """See `Backend`."""
        return measured_layer_times(model.config, _options(setup, model), setup.device_name, cache)

    def weights(self, config: DecoderConfig, fetch: FetchTensor, cache: Path | None) -> WeightStore:
        """See `Backend`."""
        return self._local_store or FetchedStore(config, fetch, cache)

    def trim(self) -> None:
        """See `Backend`."""
        release_free_memory()


def _options(setup: NodeSetup, model: ModelSetup) -> EngineOptions:
    return EngineOptions(
        device=setup.device, dtype=model.dtype, kv_token_layers=0, max_context_tokens=model.max_context_tokens,
        threads=setup.threads,
    )  # fmt: skip
