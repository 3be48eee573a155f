"""Every family over three engines in a row equals transformers: tokens one for one, logits within 1e-4."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from helixd.engine.engine import Engine
from helixd.engine.output import Head
from helixd.engine.types import EngineOptions, SequenceSpec, StageResult, StageWork
from helixd.ids import SequenceId
from helixd.layers import LayerRange
from helixd.model.config import load_config
from helixd.model.decoder import DType
from helixd.model.index import SafetensorsIndex
from helixd.sampling import SamplingParams
from tests.families import FAMILIES, LAYERS, exact_checkpoint, reference

TOKENS = 64
PROMPT = tuple(torch.randint(1, 255, (21,), generator=torch.Generator().manual_seed(5)).tolist())
GREEDY = SamplingParams(seed=0, temperature=0.0)
# Every way to cut six layers into three stages: where the second and the third begin.
SPLITS = list(itertools.combinations(range(1, LAYERS), 2))
CHUNKINGS = [(21,), (7, 1, 13), (16, 5), (20, 1), (3, 3, 15)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def checkpoint(directory: Path, family: str) -> Path:
    path = directory / family
    if not path.exists():
        exact_checkpoint(family, path, [PROMPT], TOKENS)
    return path


def engines(path: Path, held: Sequence[tuple[int, int]], sequences: int, device: str = "cpu") -> list[Engine]:
    config = load_config(path)
    result = []
    with SafetensorsIndex.open(path) as source:
        for start, end in held:
            room = sequences * (end - start) * 96
            options = EngineOptions(device=device, kv_token_layers=room, threads=1)
            engine = Engine(config, options, page_tokens=16)
            engine.load(LayerRange(start, end), source, embedding=start == 0, head=end == LAYERS)
            result.append(engine)
    return result


@dataclass
class Stream:
    """One sequence over the engines, cut at `bounds`, its prompt coming in `chunks`."""

    id: SequenceId
    bounds: tuple[int, ...]
    chunks: tuple[int, ...]
    tokens: list[int] = field(default_factory=list)
    length: int = 0

    def next_ids(self) -> tuple[int, ...]:
        if self.length < len(PROMPT):
            done = list(itertools.accumulate(self.chunks)).index(self.length) + 1 if self.length else 0
            return PROMPT[self.length : self.length + self.chunks[done]]
        return (self.tokens[-1],)


def generate(stages: Sequence[Engine], streams: Sequence[Stream]) -> None:
    """Greedy tokens of all streams, each step of which is one batch per engine."""
    for stream in streams:
        for stage, (entry, end) in zip(stages, itertools.pairwise(stream.bounds), strict=True):
            sampling = GREEDY if end == LAYERS else None
            stage.open(SequenceSpec(stream.id, LayerRange(entry, end), len(PROMPT), sampling, PROMPT))
    while running := [stream for stream in streams if len(stream.tokens) < TOKENS]:
        ids = [stream.next_ids() for stream in running]
        ends = [stream.length + len(tokens) for stream, tokens in zip(running, ids, strict=True)]
        hidden: list[torch.Tensor | None] = [None] * len(running)
        results: list[StageResult] = []
        for stage in stages:
            works = [
                StageWork(
                    stream.id,
                    stream.length,
                    token_ids=tokens if state is None else None,
                    hidden=state,
                    sample=stage is stages[-1] and end >= len(PROMPT),
                )
                for stream, tokens, state, end in zip(running, ids, hidden, ends, strict=True)
            ]
            results = stage.forward(works)
            hidden = [result.hidden for result in results]
        for stream, end, result in zip(running, ends, results, strict=True):
            stream.length = end
            if result.token is not None:
                stream.tokens.append(result.token)
    for stage in stages:
        stage.check_integrity()
        for stream in streams:
            stage.close(stream.id)
        stage.check_integrity()
        assert stage.kv_pages_used == 0


@pytest.fixture
def logits(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Every row of logits that a head computes from here on, in order."""
    seen: list[torch.Tensor] = []
    original = Head.logits

    def spy(head: Head, hidden: torch.Tensor) -> torch.Tensor:
        result = original(head, hidden)
        seen.extend(result)
        return result

    monkeypatch.setattr(Head, "logits", spy)
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_every_split_equals_transformers(family: str, directory: Path, logits: list[torch.Tensor]) -> None:
    """All splits at once: ranges overlap, every batch mixes entries, ends, prefill chunks and decode."""
    path = checkpoint(directory, family)
    oracle = reference(path, PROMPT, TOKENS)
    chunkings = itertools.cycle(CHUNKINGS)
    streams = [Stream(SequenceId(n), (0, *cut, LAYERS), next(chunkings)) for n, cut in enumerate(SPLITS)]
    generate(engines(path, [(0, 4), (1, 5), (2, 6)], len(streams)), streams)
    for stream in streams:
        assert tuple(stream.tokens) == oracle.tokens, stream
    # Rows of streams that sample in the same step come in stream order; a stream starts with its last chunk.
    first = [len(stream.chunks) for stream in streams]
    order = sorted((first[n] + step, n, step) for n in range(len(streams)) for step in range(TOKENS))
    expected = torch.stack([oracle.logits[step] for _, _, step in order])
    torch.testing.assert_close(torch.stack(logits), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("held", "bounds"),
    [
        ([(0, 1), (1, 4), (4, 6)], (0, 1, 4, 6)),
        ([(0, 3), (2, 6), (2, 6)], (0, 2, 5, 6)),
        ([(0, 6), (0, 6), (4, 6)], (0, 2, 5, 6)),
    ],
)
def test_one_stream_over_exact_and_overlapping_ranges(
    held: list[tuple[int, int]], bounds: tuple[int, ...], directory: Path, logits: list[torch.Tensor]
) -> None:
    path = checkpoint(directory, "llama3")
    oracle = reference(path, PROMPT, TOKENS)
    stream = Stream(SequenceId(1), bounds, (7, 1, 13))
    generate(engines(path, held, 1), [stream])
    assert tuple(stream.tokens) == oracle.tokens
    torch.testing.assert_close(torch.stack(logits), oracle.logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("float16", 0.05), ("bfloat16", 0.25)])
def test_scores_are_those_of_transformers(directory: Path, dtype: DType, tolerance: float) -> None:
    """Teacher-forced, so that half precision may round: the reference tokens keep their log probabilities."""
    path = checkpoint(directory, "llama3")
    oracle = reference(path, PROMPT, TOKENS)
    ids = (*PROMPT, *oracle.tokens[:-1])
    exact = torch.log_softmax(oracle.logits, -1)
    with SafetensorsIndex.open(path) as source:
        engine = Engine(load_config(path), EngineOptions(dtype=dtype, kv_token_layers=6 * 128), page_tokens=16)
        engine.load(LayerRange(0, LAYERS), source, embedding=True, head=True)
    engine.open(SequenceSpec(SequenceId(1), LayerRange(0, LAYERS), len(PROMPT), GREEDY))
    wanted = (*[None] * (len(PROMPT) - 1), *oracle.tokens)
    got: list[float] = []
    # A chunk, then single tokens.
    for start, end in [(0, 60), *((at, at + 1) for at in range(60, len(ids)))]:
        work = StageWork(SequenceId(1), start, token_ids=ids[start:end], score=wanted[start:end])
        [result] = engine.forward([work])
        assert result.scores is not None
        got += [score.logprob for score in result.scores if score is not None]
    expected = [float(exact[row, token]) for row, token in enumerate(oracle.tokens)]
    assert max(abs(a - b) for a, b in zip(got, expected, strict=True)) < tolerance


def test_dynamic_scaling_of_a_prompt_longer_than_the_original_length(directory: Path) -> None:
    """In chunks and after recovery: prompt + emitted tokens prefilled again go on as if nothing had happened."""
    prompt = tuple(torch.randint(1, 255, (55,), generator=torch.Generator().manual_seed(9)).tolist())
    path = directory / "long-dynamic"
    exact_checkpoint("llama-dynamic", path, [prompt], 24)
    oracle = reference(path, prompt, 24).tokens
    [engine] = engines(path, [(0, LAYERS)], 2)
    ids = (*prompt, *oracle)
    for known in (0, 10):
        sequence = SequenceId(known)
        prefix = ids[: len(prompt) + known]
        engine.open(SequenceSpec(sequence, LayerRange(0, LAYERS), len(prompt), GREEDY, prefix))
        engine.forward([StageWork(sequence, 0, token_ids=prefix[:30])])
        tokens = []
        [result] = engine.forward([StageWork(sequence, 30, token_ids=prefix[30:], sample=True)])
        while result.token is not None and len(tokens) + known < len(oracle) - 1:
            tokens.append(result.token)
            at = len(prefix) + len(tokens) - 1
            [result] = engine.forward([StageWork(sequence, at, token_ids=(result.token,), sample=True)])
        assert (*tokens, result.token) == oracle[known:]
        engine.close(sequence)


@pytest.mark.gpu
def test_cuda_equals_transformers(directory: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine")
    for family in FAMILIES:
        path = checkpoint(directory, family)
        oracle = reference(path, PROMPT, TOKENS)
        streams = [Stream(SequenceId(n), (0, LAYERS), chunks) for n, chunks in enumerate(CHUNKINGS)]
        generate(engines(path, [(0, LAYERS)], len(streams), "cuda"), streams)
        assert all(tuple(stream.tokens) == oracle.tokens for stream in streams), family
