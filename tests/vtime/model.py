"""A model that computes hashes: the next token depends on every id before it, through every layer, in order.

Position p at layer l mixes what layer l saw at all positions before p (its KV) with what the layer below gives at p. A
KV entry that is missing, of another sequence or twice there, a layer left out, a wrong seed, choice or list of emitted
ids: each changes every token after it. The books are stricter than a real engine's: what a sound cluster never asks
for is complained about, not only refused.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from helixd.engine.types import LayerTimes, SequenceSpec
from helixd.ids import SequenceId
from helixd.layers import LayerRange
from helixd.model.config import parse_config
from helixd.model.decoder import DecoderConfig
from helixd.model.weights import RawTensor, WeightSource
from helixd.sampling import SamplingParams, TokenLogprobs
from helixd.worker.backend import FetchTensor, ModelSetup, NodeSetup
from helixd.worker.batcher import Pass
from helixd.worker.gauge import SpeedGauge
from helixd.worker.steps import DrawnToken, ScoredPass, Step, StepOutcome
from tests.vtime.loop import VirtualLoop

VOCABULARY = 250
ROW_BYTES = 8
PAGE_TOKENS = 64
LOAD_LAYER_S = 0.05
MEASURE_S = 0.2
STEP_S, ROW_S = 0.02, 0.0005
TIMES = LayerTimes(((1.0, 1e-3), (256.0, 1e-2)), ((1.0, 1e-3), (64.0, 4e-3)))

Complain = Callable[[str], None]


def raw_config(num_layers: int) -> dict[str, object]:
    """A config.json whose rows are `ROW_BYTES` wide in float32."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": ROW_BYTES // 4,
        "intermediate_size": 266, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 2,
        "num_hidden_layers": num_layers, "vocab_size": VOCABULARY, "max_position_embeddings": 4096,
        "torch_dtype": "float32", "tie_word_embeddings": False,
    }  # fmt: skip


def decoder(num_layers: int) -> DecoderConfig:
    return parse_config(raw_config(num_layers))


def mix(*parts: int) -> int:
    return hash(parts) & 0x7FFF_FFFF_FFFF_FFFF


def embed(token: int, position: int) -> int:
    return mix(token, position)


def through(layer: int, state: int, row: int) -> tuple[int, int]:
    """The layer's state after this position (its KV entry), and the row it gives."""
    after = mix(state, row, layer)
    return after, mix(after, layer)


def draw(row: int, sampling: SamplingParams, output: Sequence[int]) -> int:
    return mix(row, sampling.seed, sampling.choice, sum(output), len(output)) % VOCABULARY


def logprobs(row: int, token: int, sampling: SamplingParams) -> TokenLogprobs:
    top = tuple(((token + i) % VOCABULARY, float(-i - row % 7)) for i in range(sampling.logprobs or 0))
    return TokenLogprobs(float(-(mix(row, token) % 1000)), top)


def reference(
    num_layers: int, prompt: Sequence[int], count: int, sampling: SamplingParams
) -> tuple[list[int], list[TokenLogprobs | None], list[TokenLogprobs]]:
    """What one choice answers: tokens, the prompt's scores, the tokens' log probabilities."""
    states = [0] * num_layers
    output: list[int] = []
    scores: list[TokenLogprobs | None] = [None]
    drawn: list[TokenLogprobs] = []
    for position in range(len(prompt) + max(0, count - 1)):
        token = prompt[position] if position < len(prompt) else output[position - len(prompt)]
        row = embed(token, position)
        for layer in range(num_layers):
            states[layer], row = through(layer, states[layer], row)
        if position + 1 < len(prompt):
            scores.append(logprobs(row, prompt[position + 1], sampling))
        elif count:
            output.append(draw(row, sampling, output))
            drawn.append(logprobs(row, output[-1], sampling))
    return output, scores, drawn


class _Sequence:
    def __init__(self, spec: SequenceSpec) -> None:
        self.spec = spec
        self.length = 0
        self.states = dict.fromkeys(spec.layers.layers(), 0)
        self.output = list(spec.prefix[spec.prompt_tokens :])

    @property
    def pages(self) -> int:
        return -(-self.length // PAGE_TOKENS) * len(self.spec.layers)


class HashEngine:
    """A `StageEngine`. KV is charged in pages of `PAGE_TOKENS` tokens of one layer."""

    def __init__(self, loop: VirtualLoop, num_layers: int, complain: Complain) -> None:
        self.loaded: frozenset[int] = frozenset()
        self.kv_capacity_token_layers = 0
        self.sequences: dict[SequenceId, _Sequence] = {}
        self._closed: set[SequenceId] = set()
        self._loop = loop
        self._num_layers = num_layers
        self._complain = complain

    @property
    def kv_pages_used(self) -> int:
        return sum(sequence.pages for sequence in self.sequences.values())

    @property
    def kv_used_token_layers(self) -> int:
        return self.kv_pages_used * PAGE_TOKENS

    def set_kv_capacity(self, token_layers: int) -> None:
        self.kv_capacity_token_layers = token_layers

    def load(
        self, layers: LayerRange, source: WeightSource, *, embedding: bool, head: bool,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:  # fmt: skip
        if embedding != (layers.start == 0) or head != (layers.end == self._num_layers):
            self._complain(f"layers {layers} are loaded with embedding={embedding}, head={head}")
        for layer in layers.layers():
            if layer not in self.loaded:
                self._loop.spend(LOAD_LAYER_S)
        self.loaded |= set(layers.layers())
        if progress is not None:
            progress(len(layers), len(layers))

    def unload(self, layers: LayerRange) -> None:
        gone = set(layers.layers())
        for handle, sequence in self.sequences.items():
            if gone & set(sequence.spec.layers.layers()):
                self._complain(f"layers {layers} are unloaded under sequence {handle}, which uses them")
        self.loaded -= gone

    def open(self, spec: SequenceSpec) -> None:
        if spec.id in self.sequences or spec.id in self._closed:
            self._complain(f"sequence {spec.id} is opened twice or after its end")
        if not self.loaded.issuperset(spec.layers.layers()):
            self._complain(f"sequence {spec.id} wants layers {spec.layers}, loaded are {sorted(self.loaded)}")
            raise ValueError("layers are not loaded")
        last = spec.layers.end == self._num_layers
        if last != (spec.sampling is not None) or last != bool(spec.prefix):
            self._complain(f"sequence {spec.id} of {spec.layers} has sampling {spec.sampling}, {len(spec.prefix)} ids")
        self.sequences[spec.id] = _Sequence(spec)

    def close(self, handle: SequenceId) -> None:
        # One whose open was withdrawn or refused is closed too.
        self.sequences.pop(handle, None)
        self._closed.add(handle)

    def run(self, scored: ScoredPass, outcome: StepOutcome) -> list[int] | None:
        """The pass's rows after this stage's layers; None if it is in the outcome already."""
        item = scored.item
        sequence = self.sequences.get(item.handle)
        if sequence is None or item.start != sequence.length:
            have = "is not open" if sequence is None else f"has KV up to {sequence.length}"
            self._complain(f"a pass of sequence {item.handle} starts at {item.start}, which {have}")
            outcome.failed.append((item, have))
            return None
        before, length = sequence.pages, sequence.length
        sequence.length += item.n
        if (self.kv_pages_used) * PAGE_TOKENS > self.kv_capacity_token_layers and sequence.pages > before:
            sequence.length = length
            outcome.out_of_kv.append(item)
            return None
        rows = []
        for at, row in enumerate(self._entry_rows(item)):
            for layer in sequence.spec.layers.layers():
                sequence.states[layer], row = through(layer, sequence.states[layer], row)
            rows.append(row)
            if (
                scored.score is not None
                and scored.score[at] is None
                and item.start + at + 1 < sequence.spec.prompt_tokens
            ):
                self._complain(f"sequence {item.handle}: no id to score at {item.start + at}")
        return rows

    def answer(self, scored: ScoredPass, rows: list[int], outcome: StepOutcome) -> None:
        """The last stage's token and scores."""
        item, sequence = scored.item, self.sequences[scored.item.handle]
        sampling = sequence.spec.sampling
        assert sampling is not None
        if scored.score is not None:
            scores = tuple(
                None if token is None else logprobs(row, token, sampling)
                for row, token in zip(rows, scored.score, strict=True)
            )
            outcome.scored.append((item, scores))
        if item.sample:
            if item.start + item.n != item.step:
                self._complain(f"a pass up to {item.start + item.n} draws token {item.step}")
            token = draw(rows[-1], sampling, sequence.output)
            sequence.output.append(token)
            wanted = logprobs(rows[-1], token, sampling) if sampling.logprobs is not None else None
            outcome.drawn.append(DrawnToken(item, token, wanted))

    @staticmethod
    def _entry_rows(item: Pass) -> list[int]:
        if item.token_ids is not None:
            return [embed(token, item.start + at) for at, token in enumerate(item.token_ids)]
        assert item.rows is not None
        data = item.rows
        return [int.from_bytes(data[at : at + ROW_BYTES], "little") for at in range(0, len(data), ROW_BYTES)]


class HashCompute:
    """A `StageCompute`."""

    row_bytes = ROW_BYTES

    def __init__(
        self, loop: VirtualLoop, num_layers: int, complain: Complain, slowdown: Callable[[], float]
    ) -> None:  # fmt: skip
        self.engine = HashEngine(loop, num_layers, complain)
        self._loop = loop
        self._slowdown = slowdown
        self._gauge = SpeedGauge(TIMES)

    def run(self, step: Step) -> StepOutcome:
        engine, outcome = self.engine, StepOutcome()
        for handle in step.closes:
            engine.close(handle)
        for spec in step.opens:
            try:
                engine.open(spec)
            except ValueError:
                continue
        onward: dict[str, tuple[list[Pass], list[int]]] = {}
        rows_done = 0
        for scored, group in zip(step.passes, step.groups, strict=True):
            rows = engine.run(scored, outcome)
            if rows is None:
                continue
            rows_done += len(rows)
            if group:
                items, together = onward.setdefault(group, ([], []))
                items.append(scored.item)
                together.extend(rows)
            else:
                engine.answer(scored, rows, outcome)
        for group, (items, together) in onward.items():
            packed = b"".join(row.to_bytes(ROW_BYTES, "little") for row in together)
            outcome.rows.append((group, items, memoryview(packed)))
        work = [(engine.sequences[s.item.handle].spec.layers, s.item.n) for s in step.passes]
        usual_s = sum(dataclasses.astuple(self._gauge.expected(work)))
        outcome.layers_s = usual_s * self._slowdown()
        self._loop.spend(STEP_S + ROW_S * rows_done + outcome.layers_s - usual_s)
        return outcome


class HashBackend:
    """A worker's `Backend` in a virtual world. `slowdown`: of nodes that are slower now than they are measured."""

    def __init__(self, loop: VirtualLoop, complain: Complain, slowdown: Mapping[str, float]) -> None:
        self._loop = loop
        self._complain = complain
        self._slowdown = slowdown

    def compute(self, setup: NodeSetup, model: ModelSetup) -> HashCompute:
        self._loop.spend(0.1)
        return HashCompute(
            self._loop, model.config.num_layers, lambda what: self._complain(f"{setup.node}: {what}"),
            lambda: self._slowdown.get(setup.node, 1.0),
        )  # fmt: skip

    def measure(self, setup: NodeSetup, model: ModelSetup, cache: Path | None) -> LayerTimes:
        self._loop.spend(MEASURE_S)
        now = self._slowdown.get(setup.node, 1.0)
        prompt, decode = (
            tuple((rows, seconds * now) for rows, seconds in points)
            for points in (TIMES.prompt_layer_time_s, TIMES.decode_layer_time_s)
        )
        return LayerTimes(prompt, decode)

    def weights(self, config: DecoderConfig, fetch: FetchTensor, cache: Path | None) -> "NoWeights":
        return NoWeights()

    def trim(self) -> None: ...


class NoWeights:
    """Hashes need none."""

    async def ensure(self, layers: LayerRange, progress: Callable[[int, int], None]) -> WeightSource:
        return self

    def read(self, name: str) -> RawTensor:
        raise AssertionError(name)

    def __contains__(self, name: str) -> bool:
        return False
