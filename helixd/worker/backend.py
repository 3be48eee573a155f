"""What a worker asks of whatever computes for it: torch on a real device, or something that only takes the time.

The seam between a worker's bookkeeping (sequences, queues, links) and its devices. Nothing here touches a tensor.
"""

from collections.abc import Awaitable, Callable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from helixd.engine.types import LayerTimes
from helixd.ids import NodeId
from helixd.layers import LayerRange
from helixd.model.decoder import DecoderConfig, DType
from helixd.model.weights import RawTensor, WeightSource
from helixd.worker.batcher import BatchLimits
from helixd.worker.steps import Step, StepOutcome

FetchTensor = Callable[[str], Awaitable[RawTensor]]
"""Fetch one tensor by name. Raises PeerLost, or ModelError if the coordinator does not have it."""


class WeightStore(Protocol):
    """Makes the weights of a range readable."""

    async def ensure(self, layers: LayerRange, progress: Callable[[int, int], None]) -> WeightSource:
        """A source that has everything `layers` need (embedding and head included at the ends).

        Raises ModelError, PeerLost.
        """
        ...


@dataclass(frozen=True, slots=True)
class NodeSetup:
    """A device and how much of its memory helixd may use, for weights and KV together."""

    node: NodeId
    device: str
    device_name: str
    memory_total_bytes: int
    memory_budget_bytes: int
    threads: int = 0


@dataclass(frozen=True, slots=True)
class ModelSetup:
    """The model as the coordinator's welcome declares it."""

    name: str
    fingerprint: str
    config: DecoderConfig
    dtype: DType
    max_context_tokens: int
    limits: BatchLimits


class StageEngine(Protocol):
    """Layers and KV of one node. Called in the node's thread, `load` in its loading thread."""

    @property
    def loaded(self) -> AbstractSet[int]:
        """The layers held."""
        ...

    @property
    def kv_capacity_token_layers(self) -> int:
        """The hard limit."""
        ...

    @property
    def kv_used_token_layers(self) -> int:
        """What open sequences hold."""
        ...

    @property
    def kv_pages_used(self) -> int:
        """The same in pages of one layer."""
        ...

    def set_kv_capacity(self, token_layers: int) -> None:
        """Change the hard limit."""
        ...

    def load(
        self, layers: LayerRange, source: WeightSource, *, embedding: bool, head: bool,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:  # fmt: skip
        """Hold `layers` too. Raises ModelError, MemoryError, RuntimeError."""
        ...

    def unload(self, layers: LayerRange) -> None:
        """Drop these layers; none may be in use."""
        ...


class StageCompute(Protocol):
    """A node's engine as the node's loop drives it, rows as bytes."""

    @property
    def engine(self) -> StageEngine:
        """What computes."""
        ...

    @property
    def row_bytes(self) -> int:
        """Size of one token's hidden state."""
        ...

    def run(self, step: Step) -> StepOutcome:
        """Do a step, in the node's thread."""
        ...


class Backend(Protocol):
    """How the nodes of a worker compute. The first two block and run in the node's thread."""

    def compute(self, setup: NodeSetup, model: ModelSetup) -> StageCompute:
        """A fresh engine without layers."""
        ...

    def measure(self, setup: NodeSetup, model: ModelSetup, cache: Path | None) -> LayerTimes:
        """Layer times of the node's device for this model, `cache` being where they may be remembered."""
        ...

    def weights(self, config: DecoderConfig, fetch: FetchTensor, cache: Path | None) -> WeightStore:
        """Where weights come from: `fetch` asks the coordinator, `cache` is where fetched ones may be kept."""
        ...

    def trim(self) -> None:
        """Give memory that loading left over back to the system. Blocking."""
        ...
