"""Any history of opens, chunks, decode steps, repeats and closes gives each sequence what it gets alone."""

import dataclasses
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helixd.engine.engine import Engine, KvExhausted
from helixd.engine.kv import KvPool
from helixd.engine.timing import RandomWeights
from helixd.engine.types import EngineOptions, SequenceSpec, StageWork
from helixd.errors import ModelError, OutOfKv
from helixd.ids import SequenceId
from helixd.layers import LayerRange
from helixd.model.config import parse_config
from helixd.model.decoder import DecoderConfig
from helixd.model.names import TensorSpec
from helixd.model.sizes import required_tensors
from helixd.model.weights import RawTensor
from helixd.sampling import SamplingParams

LAYERS = 4
GREEDY = SamplingParams(seed=0, temperature=0.0)
TOTAL = 40
torch.set_num_threads(1)


def make_config() -> DecoderConfig:
    """Two kinds of layers: one windowed, one not."""
    config = parse_config(
        {
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_hidden_layers": LAYERS,
            "vocab_size": 64,
            "max_position_embeddings": 128,
        }
    )
    windowed = tuple(dataclasses.replace(spec, window=5 if n % 2 else None) for n, spec in enumerate(config.layers))
    return dataclasses.replace(config, layers=windowed)


class Weights(RandomWeights):
    """Large enough that positions and layers matter."""

    def read(self, name: str) -> RawTensor:
        raw = super().read(name)
        torch.frombuffer(raw.data, dtype=torch.float32).mul_(10.0)
        return raw


CONFIG = make_config()
SOURCE = Weights(CONFIG, list(required_tensors(CONFIG).values()))


def make_engine(room: int = LAYERS * TOTAL * 8, config: DecoderConfig = CONFIG) -> Engine:
    engine = Engine(config, EngineOptions(kv_token_layers=room, max_context_tokens=64), page_tokens=4, slab_pages=2)
    engine.load(LayerRange(0, LAYERS), SOURCE, embedding=True, head=True)
    return engine


ENGINE = make_engine()
IDS = [tuple(torch.randint(0, 64, (TOTAL,), generator=torch.Generator().manual_seed(s)).tolist()) for s in range(4)]
HIDDEN = [torch.randn(TOTAL, 32, generator=torch.Generator().manual_seed(s)) for s in range(4)]
ENTRIES = [0, 0, 1, 3]
ENDS = [LAYERS, 2, LAYERS, LAYERS]


def work_of(which: int, start: int, end: int, wanted: str = "scores") -> StageWork:
    """Positions `[start, end)` of one of four fixed sequences. `wanted` of the last stage: scores, token or nothing."""
    last = ENDS[which] == LAYERS
    ids = IDS[which][start:end]
    score, sample = ids if last and wanted == "scores" else None, last and wanted == "token"
    if ENTRIES[which] == 0:
        return StageWork(SequenceId(which), start, token_ids=ids, score=score, sample=sample)
    return StageWork(SequenceId(which), start, hidden=HIDDEN[which][start:end], score=score, sample=sample)


def spec_of(which: int) -> SequenceSpec:
    sampling = dataclasses.replace(GREEDY, logprobs=0) if ENDS[which] == LAYERS else None
    return SequenceSpec(SequenceId(which), LayerRange(ENTRIES[which], ENDS[which]), TOTAL, sampling)


def values(engine: Engine, works: list[StageWork]) -> list[torch.Tensor]:
    """What each work yields: its hidden states, or its scores."""
    out = []
    for result in engine.forward(works):
        if result.hidden is not None:
            out.append(result.hidden.clone())
        elif result.scores is None:
            assert result.token is None
            out.append(torch.empty(0, 1))
        else:
            out.append(torch.tensor([score.logprob for score in result.scores if score is not None]).unsqueeze(1))
    return out


def solo() -> list[torch.Tensor]:
    engine = make_engine()
    result = []
    for which in range(4):
        engine.open(spec_of(which))
        result += values(engine, [work_of(which, 0, TOTAL)])
        engine.close(SequenceId(which))
    return result


SOLO = solo()

# For each sequence in a step: how many tokens it advances (0: not in the batch), how far it goes back first, and what
# is wanted of the last stage.
moves = st.tuples(
    *[
        st.tuples(
            st.sampled_from([0, 1, 1, 2, 3, 9]),
            st.sampled_from([0, 0, 0, 1, 6]),
            st.sampled_from(["scores", "nothing"]),
        )
    ]
    * 4
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(moves, st.sampled_from([None, None, None, 0, 1, 2, 3])), max_size=12))
def test_any_interleaving_equals_solo_runs(
    steps: list[tuple[tuple[tuple[int, int, str], ...], int | None]],
) -> None:
    lengths: dict[int, int] = {}
    try:
        for move, closed in steps:
            works = []
            for which, (forward, back, wanted) in enumerate(move):
                if which not in lengths:
                    ENGINE.open(spec_of(which))
                    lengths[which] = 0
                start = max(0, lengths[which] - back)
                end = min(start + forward, TOTAL)
                if end > start:
                    works.append(work_of(which, start, end, wanted))
                    lengths[which] = end
            for work, got in zip(works, values(ENGINE, works), strict=True):
                expected = SOLO[work.sequence][work.start : work.start + len(got)]
                torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)
            ENGINE.check_integrity()
            pages = sum(-(-length // 4) * (ENDS[which] - ENTRIES[which]) for which, length in lengths.items())
            assert ENGINE.kv_pages_used == pages
            if closed is not None and lengths.pop(closed, None) is not None:
                ENGINE.close(SequenceId(closed))
    finally:
        for which in range(4):
            ENGINE.close(SequenceId(which))
    ENGINE.check_integrity()
    assert ENGINE.kv_pages_used == ENGINE.kv_used_token_layers == 0


@pytest.mark.parametrize("others", ["scores", "nothing", "token"])
def test_a_token_does_not_depend_on_what_others_of_the_step_want(others: str) -> None:
    """Rows that nobody reads are left out of the last layer; those that are read must be the right ones."""
    tokens = []
    for companions in ([], [0, 2]):
        for which in [*companions, 3]:
            ENGINE.open(dataclasses.replace(spec_of(which), prompt_tokens=1, prefix=IDS[which][:9]))
        works = [work_of(which, 0, 7, others) for which in companions]
        if others == "token":  # a sampler counts from its prefix on
            works = [work_of(which, 0, 9, others) for which in companions]
        results = ENGINE.forward([*works, work_of(3, 0, 9, "token")])
        tokens.append(results[-1].token)
        for which in range(4):
            ENGINE.close(SequenceId(which))
    assert tokens[0] is not None
    assert tokens[0] == tokens[1]


def test_a_full_pool_refuses_the_batch_and_changes_nothing() -> None:
    engine = make_engine(room=LAYERS * 16)
    assert engine.kv_capacity_token_layers == LAYERS * 16
    for which in (0, 2):
        engine.open(spec_of(which))
    engine.forward([work_of(0, 0, 6), work_of(2, 0, 5)])
    used = engine.kv_pages_used
    with pytest.raises(KvExhausted, match="sequence 2 needs") as refused:
        engine.forward([work_of(0, 6, 8), work_of(2, 5, 17)])
    assert isinstance(refused.value, OutOfKv)
    assert refused.value.sequence == 2
    assert (engine.kv_pages_used, engine.length(SequenceId(0)), engine.length(SequenceId(2))) == (used, 6, 5)
    engine.check_integrity()
    [got] = values(engine, [work_of(0, 6, 8)])
    torch.testing.assert_close(got, SOLO[0][6:8], rtol=0, atol=2e-5)
    engine.close(SequenceId(2))
    engine.close(SequenceId(2))
    [got] = values(engine, [work_of(0, 8, 16)])
    torch.testing.assert_close(got, SOLO[0][8:16], rtol=0, atol=2e-5)
    with pytest.raises(OutOfKv):
        engine.forward([work_of(0, 16, 17)])


def test_a_sequence_goes_on_while_the_room_for_kv_changes() -> None:
    """Less room than is held refuses what would take more, and takes nothing away; later there is more again."""
    engine, sequence = make_engine(), SequenceId(1)
    engine.open(SequenceSpec(sequence, LayerRange(0, LAYERS), TOTAL, GREEDY, IDS[0]))
    room = engine.kv_capacity_token_layers
    score = (*IDS[0][1:], None)

    def run(target: Engine, start: int, end: int) -> list[float]:
        work = StageWork(sequence, start, token_ids=IDS[0][start:end], score=score[start:end])
        [result] = target.forward([work])
        assert result.scores is not None
        return [found.logprob for found in result.scores if found is not None]

    got = run(engine, 0, 10)
    engine.set_kv_capacity(LAYERS * 4)
    got += run(engine, 10, 12)
    with pytest.raises(KvExhausted):
        run(engine, 12, 20)
    engine.check_integrity()
    for capacity in (room, 2 * room, LAYERS * TOTAL):
        engine.set_kv_capacity(capacity)
        assert engine.kv_capacity_token_layers <= capacity
        got += run(engine, len(got), len(got) + 7)
        engine.check_integrity()
    engine.close(sequence)
    alone = make_engine()
    alone.open(SequenceSpec(sequence, LayerRange(0, LAYERS), TOTAL, GREEDY, IDS[0]))
    assert got == pytest.approx(run(alone, 0, len(got)), abs=1e-5)


def test_an_unused_pool_is_given_back_before_the_next_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes all that weights leave of a device: both at once would be more than there is."""
    engine = make_engine()
    old = [weakref.ref(tensor) for tensor in (engine._pool.k, engine._pool.v)]
    made: list[bool] = []
    original = KvPool.__init__

    def spy(pool: KvPool, **options: Any) -> None:
        if options["pages"]:
            made.append(any(reference() is not None for reference in old))
        original(pool, **options)

    monkeypatch.setattr(KvPool, "__init__", spy)
    engine.set_kv_capacity(LAYERS * TOTAL)
    assert made == [False]


def test_work_that_does_not_fit_is_refused_by_name() -> None:
    engine = make_engine()
    for which in (0, 1, 2):
        engine.open(spec_of(which))
    hidden = torch.zeros(1, 32)
    ids = (1,)
    wrong = [
        (StageWork(SequenceId(9), 0, token_ids=ids), "sequence 9 is not open"),
        (StageWork(SequenceId(0), 1, token_ids=ids), "starts at 1, its KV ends at 0"),
        (StageWork(SequenceId(0), 0, token_ids=()), "without tokens"),
        (StageWork(SequenceId(0), 0, hidden=hidden), "token ids only"),
        (StageWork(SequenceId(0), 0, token_ids=(64,)), "outside the vocabulary"),
        (StageWork(SequenceId(0), 0, token_ids=(1,) * 65), "65 tokens, at most 64"),
        (StageWork(SequenceId(0), 0, token_ids=ids, score=(1, 2)), "2 ids to score for 1"),
        (StageWork(SequenceId(0), 0, token_ids=ids, score=(64,)), "id to score is outside"),
        (StageWork(SequenceId(1), 0, token_ids=ids, sample=True), "only the last stage samples"),
        (StageWork(SequenceId(2), 0, token_ids=ids), "hidden states only"),
        (StageWork(SequenceId(2), 0, hidden=torch.zeros(1, 31)), r"shape \[1, 31\]"),
    ]
    for work, message in wrong:
        with pytest.raises(ValueError, match=message):
            engine.forward([work_of(1, 0, 1), work] if work.sequence != 1 else [work])
    with pytest.raises(ValueError, match="twice"):
        engine.forward([work_of(0, 0, 1), work_of(0, 0, 1)])
    assert engine.kv_pages_used == 0
    assert engine.forward([]) == []
    assert len(engine.forward([StageWork(SequenceId(0), 0, token_ids=(1,) * 64)])) == 1


def test_opening_needs_the_layers_and_the_vocabulary() -> None:
    engine = Engine(CONFIG, EngineOptions(kv_token_layers=64))
    engine.load(LayerRange(1, LAYERS), SOURCE, embedding=False, head=False)
    with pytest.raises(ValueError, match=r"wants layers \[0, 2\), loaded are \[1, 2, 3\]"):
        engine.open(SequenceSpec(SequenceId(1), LayerRange(0, 2), 1))
    with pytest.raises(ValueError, match="no head is loaded"):
        engine.open(SequenceSpec(SequenceId(1), LayerRange(1, LAYERS), 1))
    engine.load(LayerRange(0, 1), SOURCE, embedding=False, head=False)
    with pytest.raises(ValueError, match="no embedding is loaded"):
        engine.open(SequenceSpec(SequenceId(1), LayerRange(0, 1), 1))
    engine = make_engine()
    with pytest.raises(ValueError, match="logit_bias"):
        engine.open(SequenceSpec(SequenceId(1), LayerRange(0, LAYERS), 1, SamplingParams(0, logit_bias=((64, 1.0),))))
    engine.open(spec_of(0))
    with pytest.raises(ValueError, match="already open"):
        engine.open(spec_of(0))


def test_loading_keeps_what_is_held_and_unloading_refuses_what_is_used() -> None:
    engine = Engine(CONFIG, EngineOptions(kv_token_layers=64))
    seen: list[tuple[int, int]] = []
    engine.load(LayerRange(1, 3), SOURCE, embedding=False, head=False)
    engine.load(
        LayerRange(0, LAYERS),
        SOURCE,
        embedding=True,
        head=True,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert engine.loaded == {0, 1, 2, 3}
    engine.open(spec_of(3))
    engine.unload(LayerRange(0, 3))
    assert engine.loaded == {3}
    with pytest.raises(ValueError, match="in use by sequence 3"):
        engine.unload(LayerRange(2, 4))
    engine.close(SequenceId(3))
    engine.unload(LayerRange(2, 4))
    assert engine.loaded == frozenset()


def test_missing_and_misshapen_tensors_are_named() -> None:
    specs = required_tensors(CONFIG)
    name = "model.layers.2.mlp.down_proj.weight"
    without = Weights(CONFIG, [spec for spec in specs.values() if spec.name != name])
    engine = Engine(CONFIG, EngineOptions(kv_token_layers=64))
    with pytest.raises(ModelError, match=rf"{name} .* missing"):
        engine.load(LayerRange(0, LAYERS), without, embedding=False, head=False)
    assert engine.loaded == {0, 1}
    changed = [spec if spec.name != name else TensorSpec(name, (32, 47)) for spec in specs.values()]
    with pytest.raises(ModelError, match=rf"{name} has shape \[32, 47\]"):
        engine.load(LayerRange(0, LAYERS), Weights(CONFIG, changed), embedding=False, head=False)
    engine.load(LayerRange(0, LAYERS), SOURCE, embedding=False, head=False)
    assert engine.loaded == {0, 1, 2, 3}
