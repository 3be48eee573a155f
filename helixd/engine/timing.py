"""How long one layer takes on this device, measured on random weights of the model's shape: no checkpoint needed.

Steps of the real engine are timed, so their planning and dispatch are part of the figure. Wall time, the median of a
few runs. `budget_s` bounds the timed part; making the weights comes on top.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from helixd.engine.engine import Engine
from helixd.engine.types import EngineOptions, LayerTimes, SequenceSpec, StageWork
from helixd.errors import ModelError
from helixd.ids import SequenceId
from helixd.layers import LayerRange
from helixd.model.decoder import DTYPE_BYTES, DecoderConfig
from helixd.model.names import TensorSpec, layer_weights
from helixd.model.weights import RawTensor

_RUNS = 5
_PATTERN_VALUES = 1 << 16


class RandomWeights:
    """A `WeightSource` of small random numbers for the given tensors."""

    def __init__(self, config: DecoderConfig, tensors: Sequence[TensorSpec]) -> None:
        self._dtype = config.dtype
        self._specs = {spec.name: spec for spec in tensors}
        dtype = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[config.dtype]
        values = torch.randn(_PATTERN_VALUES, generator=torch.Generator().manual_seed(0)) * 0.02
        self._pattern = bytes(values.to(dtype).view(torch.uint8).numpy())

    def __contains__(self, name: str) -> bool:
        return name in self._specs

    def read(self, name: str) -> RawTensor:
        """See `WeightSource`."""
        spec = self._specs.get(name)
        if spec is None:
            raise ModelError(f"no tensor {name}")
        size = DTYPE_BYTES[self._dtype] * torch.Size(spec.shape).numel()
        data = bytearray(self._pattern * (size // len(self._pattern))) + self._pattern[: size % len(self._pattern)]
        return RawTensor(self._dtype, spec.shape, data)


def measure_layer_times(
    config: DecoderConfig,
    options: EngineOptions,
    *,
    prompt_tokens: Sequence[int] = (16, 64, 256, 512),
    decode_batches: Sequence[int] = (1, 4, 16, 32),
    context_tokens: int = 512,
    layers: int = 2,
    budget_s: float = 10.0,
) -> LayerTimes:
    """Time prefill of a prompt and decode of a batch whose sequences have `context_tokens` each.

    `layers` layers from the middle of the model are timed together. Points are measured in rising order; once the
    budget is spent, larger ones are left out, but at least two of each kind are measured. `options.kv_token_layers`
    is ignored.
    """
    layers = min(layers, config.num_layers)
    start = (config.num_layers - layers) // 2
    # One layer before and one after, never loaded: the timed ones then take and give hidden states.
    middle = config.layers[start : start + layers]
    shape = dataclasses.replace(config, layers=(middle[0], *middle, middle[-1]))
    held = LayerRange(1, 1 + layers)
    specs = [spec for layer in held.layers() for parts in layer_weights(shape, layer).values() for spec in parts]
    context = max(2, min(context_tokens, options.max_context_tokens))
    prompts = sorted({min(tokens, options.max_context_tokens) for tokens in prompt_tokens})
    room = (max(decode_batches) * (context + 256) + max(prompts) + 256) * layers
    engine = Engine(shape, dataclasses.replace(options, kv_token_layers=room))
    engine.load(held, RandomWeights(config, specs), embedding=False, head=False)

    def prompt(tokens: int) -> Callable[[], None]:
        work = [StageWork(SequenceId(0), 0, hidden=torch.randn(tokens, config.hidden_size))]
        engine.open(SequenceSpec(SequenceId(0), held, tokens))
        return lambda: _run(engine, work)

    def decode(batch: int) -> Callable[[], None]:
        work = []
        for number in range(batch):
            engine.open(SequenceSpec(SequenceId(number), held, context))
            engine.assume(SequenceId(number), context - 1)
            work.append(StageWork(SequenceId(number), context - 1, hidden=torch.randn(1, config.hidden_size)))
        return lambda: _run(engine, work)

    def points(sizes: Sequence[int], prepare: Callable[[int], Callable[[], None]]) -> tuple[tuple[float, float], ...]:
        deadline = time.perf_counter() + budget_s / 2
        found: list[tuple[float, float]] = []
        for size in sizes:
            if len(found) >= 2 and time.perf_counter() > deadline:
                break
            step = prepare(size)
            found.append((float(size), _median_s(step, deadline) / layers))
            for number in range(size):
                engine.close(SequenceId(number))
        return tuple(found)

    return LayerTimes(points(prompts, prompt), points(sorted(set(decode_batches)), decode))


def _run(engine: Engine, work: Sequence[StageWork]) -> None:
    result = engine.forward(work)[-1].hidden
    if result is not None and result.is_cuda:
        torch.cuda.synchronize(result.device)


def _median_s(step: Callable[[], None], deadline: float) -> float:
    """Median seconds of a few runs after one that warms up; fewer runs past the deadline."""
    step()
    times: list[float] = []
    while not times or (len(times) < _RUNS and time.perf_counter() < deadline):
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    return statistics.median(times)
