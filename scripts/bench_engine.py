#!/usr/bin/env python3
"""The engine against `transformers` (sdpa, its own cache) on one CPU thread, same dtype, same random weights.

Contenders take turns step by step in one process, so both see the same machine. Decode: one token for each of a
batch of sequences with about 192 tokens of context (the engine's differ in length, those of transformers are equal,
which flatters transformers); prefill: one prompt of 512 tokens. Both end in an argmax over the vocabulary. Medians of
thread CPU time and of wall time; the ratio is of CPU times, which a busy machine distorts least. `linears` rows time
the matrix products of the same case alone: how far their kernels differ on this CPU, which bounds what a step can gain.

Also: how late a 5 ms ticker on an asyncio loop fires while the engine computes in one other thread.

    scripts/bench_engine.py [--json] [--steps N] [--dtypes bfloat16,float32]

Exits 1 if a required ratio is missed. Needs the `dev` extra (transformers).
"""

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from helixd.engine.engine import Engine
from helixd.engine.linear import make_linear
from helixd.engine.loader import TORCH_DTYPES
from helixd.engine.types import EngineOptions, SequenceSpec, StageWork
from helixd.ids import SequenceId
from helixd.layers import LayerRange
from helixd.model.config import parse_config
from helixd.model.decoder import DType
from helixd.model.weights import RawTensor
from helixd.sampling import SamplingParams

LAYERS = 12
VOCAB = 32000
SHAPE: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "num_hidden_layers": LAYERS,
    "vocab_size": VOCAB,
    "max_position_embeddings": 4096,
}
CONTEXT_TOKENS = 192
CONTEXT_SPREAD = 64
PREFILL_TOKENS = 512
BATCHES = (1, 8, 32)
# What the project promises (ratio of transformers' CPU time to the engine's).
REQUIRED: dict[tuple[DType, str], float] = {
    ("bfloat16", "decode 1"): 1.5,
    ("bfloat16", "decode 8"): 1.8,
    ("bfloat16", "decode 32"): 1.8,
    ("bfloat16", "prefill 512"): 1.2,
    ("float32", "decode 1"): 1.2,
    ("float32", "decode 8"): 1.5,
    ("float32", "decode 32"): 1.4,
    ("float32", "prefill 512"): 1.2,
}
TICK_S = 0.005
LAG_SECONDS = 3.0


@dataclass(frozen=True, slots=True)
class Row:
    """One comparison; times are medians in milliseconds."""

    dtype: str
    case: str
    engine_cpu_ms: float
    transformers_cpu_ms: float
    engine_wall_ms: float
    transformers_wall_ms: float
    ratio: float
    required: float | None
    reached: bool


@dataclass(frozen=True, slots=True)
class Lag:
    """How late a ticker of `TICK_S` fired on the event loop, in milliseconds."""

    load: str
    ticks: int
    p50_ms: float
    p99_ms: float
    max_ms: float


class StateWeights:
    """A `WeightSource` over another model's parameters."""

    def __init__(self, state: dict[str, torch.Tensor], dtype: DType) -> None:
        self._state = state
        self._dtype = dtype

    def __contains__(self, name: str) -> bool:
        return name in self._state

    def read(self, name: str) -> RawTensor:
        """See `WeightSource`."""
        tensor = self._state[name].contiguous()
        return RawTensor(
            self._dtype, tuple(tensor.shape), bytearray(tensor.view(-1).view(torch.uint8).numpy().tobytes())
        )


class EngineRunner:
    """The engine with open sequences that step together."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._lengths: list[int] = []
        self._tokens: list[int] = []

    def open(self, lengths: Sequence[int]) -> None:
        """Prefill one sequence of each length."""
        self.close()
        for number, length in enumerate(lengths):
            sampling = SamplingParams(seed=0, temperature=0.0)
            self._engine.open(SequenceSpec(SequenceId(number), LayerRange(0, LAYERS), length, sampling))
            ids = tuple(torch.randint(0, VOCAB, (length,)).tolist())
            self._engine.forward([StageWork(SequenceId(number), 0, token_ids=ids)])
        self._lengths = list(lengths)
        self._tokens = [1] * len(lengths)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(self._lengths)

    def close(self) -> None:
        """Close them all."""
        for number in range(len(self._lengths)):
            self._engine.close(SequenceId(number))
        self._lengths = []

    def decode(self) -> None:
        """One token for each."""
        works = [
            StageWork(SequenceId(number), length, token_ids=(token,), sample=True)
            for number, (length, token) in enumerate(zip(self._lengths, self._tokens, strict=True))
        ]
        self._tokens = [result.token or 0 for result in self._engine.forward(works)]
        self._lengths = [length + 1 for length in self._lengths]

    def prefill(self, ids: torch.Tensor) -> None:
        """A new prompt up to its first token, from nothing each time."""
        self._engine.open(SequenceSpec(SequenceId(-1), LayerRange(0, LAYERS), len(ids), SamplingParams(0, 0, 0.0)))
        self._engine.forward([StageWork(SequenceId(-1), 0, token_ids=tuple(ids.tolist()), sample=True)])
        self._engine.close(SequenceId(-1))


class TransformersRunner:
    """The same with transformers' forward and dynamic cache."""

    def __init__(self, model: transformers.PreTrainedModel) -> None:
        self._model = model
        self._cache: transformers.DynamicCache | None = None
        self._tokens = torch.zeros(0)

    def open(self, batch: int, length: int) -> None:
        """Prefill a batch of equal lengths."""
        self._cache = transformers.DynamicCache()
        self._tokens = self._step(torch.randint(0, VOCAB, (batch, length)))

    def decode(self) -> None:
        """One token for each."""
        self._tokens = self._step(self._tokens)

    def prefill(self, ids: torch.Tensor) -> None:
        """A new prompt up to its first token."""
        self._cache = transformers.DynamicCache()
        self._step(ids.unsqueeze(0))

    def _step(self, ids: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            out = self._model(input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
            best: torch.Tensor = out.logits[:, -1].argmax(-1, keepdim=True)
            return best


@dataclass(frozen=True, slots=True)
class Sample:
    """One step's thread CPU seconds and wall seconds."""

    cpu_s: float
    wall_s: float


def timed(step: Callable[[], None]) -> Sample:
    """Run it once."""
    wall, cpu = time.perf_counter(), time.thread_time()
    step()
    return Sample(time.thread_time() - cpu, time.perf_counter() - wall)


def compare(dtype: DType, case: str, ours: Callable[[], None], theirs: Callable[[], None], steps: int) -> Row:
    """Alternate the two, two untimed turns first."""
    own: list[Sample] = []
    other: list[Sample] = []
    for turn in range(steps + 2):
        pair = [(own, ours), (other, theirs)]
        for samples, step in pair if turn % 2 else pair[::-1]:
            sample = timed(step)
            if turn >= 2:
                samples.append(sample)
    cpu = [statistics.median(sample.cpu_s for sample in samples) * 1e3 for samples in (own, other)]
    wall = [statistics.median(sample.wall_s for sample in samples) * 1e3 for samples in (own, other)]
    required = REQUIRED.get((dtype, case))
    ratio = cpu[1] / cpu[0]
    return Row(dtype, case, cpu[0], cpu[1], wall[0], wall[1], ratio, required, required is None or ratio >= required)


def build(dtype: DType) -> tuple[EngineRunner, TransformersRunner]:
    """Both contenders on the same weights."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SHAPE, tie_word_embeddings=False, dtype=TORCH_DTYPES[dtype])
    config._attn_implementation = "sdpa"
    model = transformers.LlamaForCausalLM(config)
    torch.nn.Module.train(model, False)
    torch.nn.Module.to(model, TORCH_DTYPES[dtype])
    room = LAYERS * (max(BATCHES) * 512 + 1024)
    decoder = parse_config({"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False, **SHAPE})
    engine = Engine(decoder, EngineOptions(dtype=dtype, kv_token_layers=room, threads=1))
    with torch.inference_mode():
        source = StateWeights(dict(model.state_dict()), dtype)
        engine.load(LayerRange(0, LAYERS), source, embedding=True, head=True)
    return EngineRunner(engine), TransformersRunner(model)


def bench_linears(dtype: DType, steps: int) -> list[Row]:
    """All linears of a step, the engine's (fused and packed) against `torch.nn.functional.linear` one by one."""
    hidden, width, kv = SHAPE["hidden_size"], SHAPE["intermediate_size"], SHAPE["num_key_value_heads"] * 64
    shapes = [(hidden + 2 * kv, hidden), (hidden, hidden), (2 * width, hidden), (hidden, width)] * LAYERS
    splits = [(hidden, kv, kv), (hidden,), (width, width), (hidden,)] * LAYERS
    weights = [torch.randn(shape).to(TORCH_DTYPES[dtype]) for shape in [*shapes, (VOCAB, hidden)]]
    own = [make_linear(weight) for weight in weights]
    parts = [torch.split(weight, list(split)) for weight, split in zip(weights, [*splits, (VOCAB,)], strict=True)]
    rows = []
    for tokens in (*BATCHES, PREFILL_TOKENS):
        inputs = [torch.randn(tokens, weight.shape[1]).to(weight.dtype) for weight in weights]
        if tokens == PREFILL_TOKENS:
            inputs[-1] = inputs[-1][:1]

        def ours(inputs: list[torch.Tensor] = inputs) -> None:
            for run, x in zip(own, inputs, strict=True):
                run(x)

        def theirs(inputs: list[torch.Tensor] = inputs) -> None:
            for group, x in zip(parts, inputs, strict=True):
                for part in group:
                    torch.nn.functional.linear(x, part)

        rows.append(compare(dtype, f"linears {tokens}", ours, theirs, steps if tokens < 100 else max(3, steps // 4)))
    return rows


def bench(dtype: DType, ours: EngineRunner, theirs: TransformersRunner, steps: int) -> list[Row]:
    """Every case of one dtype."""
    rows = []
    for batch in BATCHES:
        spread = [CONTEXT_TOKENS + (2 * n - batch + 1) * CONTEXT_SPREAD // batch for n in range(batch)]
        ours.open(spread)
        theirs.open(batch, CONTEXT_TOKENS)
        rows.append(compare(dtype, f"decode {batch}", ours.decode, theirs.decode, steps))
    ids = torch.randint(0, VOCAB, (PREFILL_TOKENS,))
    few = max(3, steps // 4)
    rows.append(
        compare(dtype, f"prefill {PREFILL_TOKENS}", lambda: ours.prefill(ids), lambda: theirs.prefill(ids), few)
    )
    return rows


async def ticker(seconds: float) -> list[float]:
    """Seconds by which each tick was late."""
    late = []
    end = time.monotonic() + seconds
    while (due := time.monotonic() + TICK_S) < end:
        await asyncio.sleep(TICK_S)
        late.append(time.monotonic() - due)
    return late


async def measure_lag(load: str, step: Callable[[], None] | None) -> Lag:
    """Lag of the loop while `step` runs over and over in one other thread (None: nothing runs)."""
    loop = asyncio.get_running_loop()
    running = True

    def work() -> None:
        torch.set_num_threads(1)
        while running and step is not None:
            step()

    with ThreadPoolExecutor(1, thread_name_prefix="engine") as pool:
        done = loop.run_in_executor(pool, work)
        late = sorted(await ticker(LAG_SECONDS))
        running = False
        await done
    at = [late[min(len(late) - 1, int(len(late) * share))] * 1e3 for share in (0.5, 0.99)]
    return Lag(load, len(late), at[0], at[1], late[-1] * 1e3)


async def lags(ours: EngineRunner) -> list[Lag]:
    """The loop alone, during decode and during prefill."""
    ids = torch.randint(0, VOCAB, (PREFILL_TOKENS,))
    ours.open([CONTEXT_TOKENS // 2] * 8)

    def decode() -> None:
        # Back to the same context now and then: KV room is bounded.
        ours.decode()
        if ours.longest > CONTEXT_TOKENS:
            ours.open([CONTEXT_TOKENS // 2] * 8)

    return [
        await measure_lag("nothing", None),
        await measure_lag("decode 8", decode),
        await measure_lag("prefill 512", lambda: ours.prefill(ids)),
    ]


def show(rows: Sequence[Row], lag: Sequence[Lag]) -> None:
    """Two tables for people."""
    console = Console(width=120)
    table = Table(title="engine against transformers (sdpa), one thread; CPU and wall in ms, medians")
    for name in ("dtype", "case", "engine cpu", "hf cpu", "engine wall", "hf wall", "ratio", "required", "reached"):
        table.add_column(name, justify="left" if name in ("dtype", "case") else "right")
    for row in rows:
        times = (row.engine_cpu_ms, row.transformers_cpu_ms, row.engine_wall_ms, row.transformers_wall_ms)
        figures = [f"{value:.1f}" for value in times]
        required = ("", "")
        if row.required is not None:
            required = (f"{row.required:.1f}x", "yes" if row.reached else "NO")
        table.add_row(row.dtype, row.case, *figures, f"{row.ratio:.2f}x", *required)
    console.print(table)
    table = Table(title=f"lag of an event loop's {TICK_S * 1e3:.0f} ms ticker while the engine computes, ms")
    for name in ("load", "ticks", "p50", "p99", "max"):
        table.add_column(name, justify="left" if name == "load" else "right")
    for item in lag:
        table.add_row(item.load, str(item.ticks), f"{item.p50_ms:.2f}", f"{item.p99_ms:.2f}", f"{item.max_ms:.2f}")
    console.print(table)


def main() -> int:
    """Run, print, say by the exit status whether the required ratios were reached."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--steps", type=int, default=24, help="timed decode steps per contender (prefill: a quarter)")
    parser.add_argument("--dtypes", default="bfloat16,float32", help="comma-separated")
    arguments = parser.parse_args()
    wanted: list[DType] = [name for name in TORCH_DTYPES if name in arguments.dtypes.split(",")]
    torch.set_num_threads(1)
    rows: list[Row] = []
    lag: list[Lag] = []
    for dtype in wanted[::-1]:
        ours, theirs = build(dtype)
        rows += bench(dtype, ours, theirs, arguments.steps)
        with torch.inference_mode():
            rows += bench_linears(dtype, arguments.steps)
        if not lag:
            lag = asyncio.run(lags(ours))
    if arguments.json:
        print(json.dumps({"rows": [asdict(row) for row in rows], "event_loop_lag": [asdict(item) for item in lag]}))
    else:
        show(rows, lag)
    return 0 if all(row.reached for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
