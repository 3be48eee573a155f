"""A worker's backend that sleeps instead of computing: as long as the cluster file's profile says, times a scale.

Rows that leave are zeros of the right size; tokens are printable bytes that depend on the position only, so that a
recovered sequence goes on the same.
"""

import time
from collections.abc import Callable
from pathlib import Path

from helixd.emulation.books import EmulatedEngine
from helixd.emulation.cost import Share, step_s
from helixd.engine.types import LayerTimes
from helixd.errors import ModelError
from helixd.layers import LayerRange
from helixd.model.decoder import DTYPE_BYTES, DecoderConfig
from helixd.model.weights import RawTensor, WeightSource
from helixd.plan.cluster.spec import NodeProfile
from helixd.sampling import TokenLogprobs
from helixd.worker.backend import FetchTensor, ModelSetup, NodeSetup
from helixd.worker.batcher import Pass
from helixd.worker.steps import DrawnToken, ScoredPass, Step, StepOutcome

_FIRST_TOKEN, _TOKENS = 97, 26


class EmulatedBackend:
    """See `Backend`. One second of the profile lasts `time_scale` seconds."""

    def __init__(self, profile: NodeProfile, time_scale: float) -> None:
        self._profile = profile
        self._time_scale = time_scale

    def compute(self, setup: NodeSetup, model: ModelSetup) -> "EmulatedCompute":
        """See `Backend`."""
        return EmulatedCompute(self._profile, model.config.hidden_size * DTYPE_BYTES[model.dtype], self._time_scale)

    def measure(self, setup: NodeSetup, model: ModelSetup, cache: Path | None) -> LayerTimes:
        """What the file says, as long as it lasts here. See `Backend`."""
        prompt, decode = (
            tuple((batch, seconds * self._time_scale) for batch, seconds in points if batch > 0 and seconds > 0)
            for points in (self._profile.prompt_layer_time_s, self._profile.decode_layer_time_s)
        )
        return LayerTimes(prompt, decode)

    def weights(self, config: DecoderConfig, fetch: FetchTensor, cache: Path | None) -> "NoWeights":
        """See `Backend`."""
        return NoWeights()

    def trim(self) -> None:
        """See `Backend`."""


class NoWeights:
    """A `WeightStore`, and the source it makes, for layers that are never computed."""

    async def ensure(self, layers: LayerRange, progress: Callable[[int, int], None]) -> WeightSource:
        """Nothing is fetched."""
        return self

    def read(self, name: str) -> RawTensor:
        """See `WeightSource`."""
        raise ModelError(f"an emulated node has no tensors, {name} was asked for")

    def __contains__(self, name: str) -> bool:
        return False


class EmulatedCompute:
    """A `StageCompute` that takes a step's time."""

    def __init__(self, profile: NodeProfile, row_bytes: int, time_scale: float) -> None:
        self.engine = EmulatedEngine()
        self.row_bytes = row_bytes
        self._profile = profile
        self._time_scale = time_scale
        self._zeros = memoryview(bytes(row_bytes))

    def run(self, step: Step) -> StepOutcome:
        """See `StageCompute`."""
        began = time.monotonic()
        outcome = StepOutcome()
        for handle in step.closes:
            self.engine.close(handle)
        for spec in step.opens:
            try:
                self.engine.open(spec)
            except ValueError:
                continue  # its first pass finds it closed and says so
        shares = []
        onward: dict[str, list[Pass]] = {}
        for scored, group in zip(step.passes, step.groups, strict=True):
            item = scored.item
            try:
                if not self.engine.extend(item.handle, item.start, item.n):
                    outcome.out_of_kv.append(item)
                    continue
            except ValueError as error:
                outcome.failed.append((item, str(error)))
                continue
            shares.append(Share(self.engine.spec(item.handle).layers, item.n))
            if group:
                onward.setdefault(group, []).append(item)
            else:
                self._answer(scored, outcome)
        for group, items in onward.items():
            outcome.rows.append((group, items, self._rows(sum(item.n for item in items))))
        until = began + step_s(self._profile, shares, self.row_bytes) * self._time_scale
        time.sleep(max(0.0, until - time.monotonic()))
        outcome.layers_s = time.monotonic() - began
        return outcome

    def _answer(self, scored: ScoredPass, outcome: StepOutcome) -> None:
        item = scored.item
        if item.sample:
            sampling = self.engine.spec(item.handle).sampling
            wanted = sampling is not None and sampling.logprobs is not None
            token = _FIRST_TOKEN + (item.start + item.n) % _TOKENS
            outcome.drawn.append(DrawnToken(item, token, TokenLogprobs(0.0, ()) if wanted else None))
        if scored.score is not None:
            scores = tuple(None if token is None else TokenLogprobs(0.0, ()) for token in scored.score)
            outcome.scored.append((item, scores))

    def _rows(self, count: int) -> memoryview:
        """`count` rows of zeros, of a buffer that all steps share: nobody writes into what is sent."""
        size = count * self.row_bytes
        if len(self._zeros) < size:
            self._zeros = memoryview(bytes(size))
        return self._zeros[:size]
