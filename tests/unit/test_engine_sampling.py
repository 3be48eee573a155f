"""Sampling: the numbers of Philox, shares that match probabilities, filters, penalties, positions drawn again."""

import dataclasses
import math

import pytest
import torch

from helixd.engine.philox import philox4x32, uniform
from helixd.engine.sampling import SamplerState, best_tokens, sample, token_logprobs
from helixd.sampling import SamplingParams

PLAIN = SamplingParams(seed=7)
LOGITS = torch.log(torch.tensor([0.5, 0.25, 0.15, 0.07, 0.03]))


def draw(params: SamplingParams, logits: torch.Tensor = LOGITS, count: int = 4000) -> list[float]:
    """Shares of each token over `count` positions."""
    states = [SamplerState(params, 0, ())] * count
    tokens = sample(logits.expand(count, -1), states, range(count))
    return [tokens.count(token) / count for token in range(len(logits))]


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(
    counter: tuple[int, int, int, int], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    """The known-answer vectors published with Random123."""
    assert philox4x32(counter, key) == expected


def test_numbers_depend_on_seed_choice_and_position_only() -> None:
    numbers = [uniform(seed, choice, position) for seed in (1, 2, -1) for choice in (0, 1) for position in (0, 1, 99)]
    assert len(set(numbers)) == len(numbers)
    assert all(0.0 <= number < 1.0 for number in numbers)
    assert uniform(3, 1, 5) == uniform(3, 1, 5)
    many = [uniform(5, 0, position) for position in range(4000)]
    assert abs(sum(many) / 4000 - 0.5) < 0.02


def test_shares_match_probabilities() -> None:
    for share, logit in zip(draw(PLAIN), LOGITS.tolist(), strict=True):
        assert abs(share - math.exp(logit)) < 0.03
    hot = draw(dataclasses.replace(PLAIN, temperature=2.0))
    expected = torch.softmax(LOGITS / 2, -1).tolist()
    assert all(abs(share - wanted) < 0.03 for share, wanted in zip(hot, expected, strict=True))


def test_filters_leave_their_tokens_in_proportion() -> None:
    assert draw(dataclasses.replace(PLAIN, top_k=1))[0] == 1.0
    kept = draw(dataclasses.replace(PLAIN, top_k=2))
    assert kept[2:] == [0.0, 0.0, 0.0]
    assert abs(kept[0] - 2 / 3) < 0.03
    # 0.5 + 0.25 reach 0.75 exactly; a little more needs the third.
    assert draw(dataclasses.replace(PLAIN, top_p=0.74))[2:] == [0.0, 0.0, 0.0]
    nucleus = draw(dataclasses.replace(PLAIN, top_p=0.76))
    assert nucleus[2] > 0 == nucleus[3] == nucleus[4]
    least = draw(dataclasses.replace(PLAIN, min_p=0.2))
    assert least[2] > 0 == least[3] == least[4]


def test_nucleus_wider_than_the_first_look() -> None:
    flat = torch.zeros(1000)
    shares = draw(dataclasses.replace(PLAIN, top_p=0.9), flat)
    assert sum(share > 0 for share in shares) > 500


def test_tiny_temperature_is_the_best_token_and_zero_is_greedy() -> None:
    assert draw(dataclasses.replace(PLAIN, temperature=1e-6), count=50)[0] == 1.0
    assert draw(dataclasses.replace(PLAIN, temperature=0.0), count=50)[0] == 1.0


@pytest.mark.parametrize("temperature", [5e-324, 1e-46, 1e-40, 1e-38])
def test_a_temperature_that_float32_cannot_hold_is_the_best_token(temperature: float) -> None:
    assert draw(dataclasses.replace(PLAIN, temperature=temperature), count=5)[0] == 1.0


@pytest.mark.parametrize("penalty", [5e-324, 1e-45, 1e-40, 1e-38])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_tiny_repetition_penalty_favours_what_was_there(penalty: float, temperature: float) -> None:
    logits = torch.tensor([[0.5, 3.0, 1.0, -1.0, 0.0]])
    params = dataclasses.replace(PLAIN, repetition_penalty=penalty, temperature=temperature)
    assert sample(logits, [SamplerState(params, 2, (2, 4))], [2]) == [2]
    # Of two that end at the same largest number either may come, and nothing else.
    several = [SamplerState(dataclasses.replace(params, choice=choice), 2, (2, 0)) for choice in range(20)]
    assert set(sample(logits.expand(20, -1), several, [2] * 20)) <= {0, 2}


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("vocab", [5, 128])
def test_logits_that_are_no_numbers_are_refused_before_anything_is_recorded(
    value: float, temperature: float, vocab: int
) -> None:
    logits = torch.zeros(2, vocab)
    logits[1, 3] = value
    params = dataclasses.replace(PLAIN, temperature=temperature, presence_penalty=1.0)
    states = [SamplerState(params, 1, (0,)) for _ in range(2)]
    with pytest.raises(ValueError, match=r"not finite.*model\.dtype"):
        sample(logits, states, [1, 1])
    assert all(0 <= token < vocab for token in sample(torch.zeros(2, vocab), states, [1, 1]))


@pytest.mark.parametrize("vocab", [64, 640, 650])
def test_best_tokens_are_the_first_best(vocab: int) -> None:
    logits = torch.randint(0, 50, (40, vocab), generator=torch.Generator().manual_seed(1)).float()
    assert best_tokens(logits).tolist() == [row.index(max(row)) for row in logits.tolist()]


def test_a_row_is_drawn_alike_in_any_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 300, generator=generator)
    params = [
        PLAIN,
        dataclasses.replace(PLAIN, temperature=0.0),
        dataclasses.replace(PLAIN, seed=8, top_k=5),
        dataclasses.replace(PLAIN, choice=1, top_p=0.5),
        dataclasses.replace(PLAIN, repetition_penalty=1.5, frequency_penalty=0.5),
        dataclasses.replace(PLAIN, logit_bias=((3, 100.0),)),
    ]

    def states() -> list[SamplerState]:
        return [SamplerState(p, 2, (1, 2)) for p in params]

    together = sample(logits, states(), [2] * 6)
    alone = [sample(logits[row : row + 1], [state], [2])[0] for row, state in enumerate(states())]
    assert together == alone
    assert together[5] == 3


def test_penalties_shape_the_logits() -> None:
    params = SamplingParams(
        0, temperature=0.0, repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25, logit_bias=((4, 9.0),)
    )
    state = SamplerState(params, 2, (0, 1, 2, 2))
    logits = torch.tensor([1.0, -1.0, 3.0, 5.0, -100.0])
    state.shape(logits)
    # 0 and 1: prompt, repetition only; 2: twice in the output; 3: unseen; 4: bias.
    assert logits.tolist() == [0.5, -2.0, 1.5 - 0.5 - 0.5, 5.0, -91.0]


def test_a_position_drawn_again_restores_the_counts() -> None:
    params = SamplingParams(0, temperature=0.0, frequency_penalty=1.0, repetition_penalty=1.1)
    logits = torch.tensor([[2.0, 1.5, 1.0, 0.2]])

    def run(state: SamplerState, positions: range) -> list[int]:
        return [sample(logits, [state], [position])[0] for position in positions]

    state = SamplerState(params, 3, (0, 3, 3))
    first = run(state, range(3, 12))
    assert len(set(first)) > 1
    assert run(state, range(6, 12)) == first[3:]
    assert run(state, range(3, 12)) == first
    resumed = SamplerState(params, 3, (0, 3, 3, *first[:5]))
    assert run(resumed, range(8, 12)) == first[5:]
    with pytest.raises(ValueError, match="position 20"):
        sample(logits, [state], [20])


def test_logprobs_are_of_the_raw_distribution() -> None:
    logits = torch.stack([LOGITS, LOGITS.flip(0)])
    none, two = token_logprobs(logits, [1, 1], [0, 2])
    assert none.top == ()
    assert math.isclose(none.logprob, math.log(0.25), rel_tol=1e-5)
    assert math.isclose(two.logprob, math.log(0.07), rel_tol=1e-5)
    assert [token for token, _ in two.top] == [4, 3]
    assert math.isclose(two.top[0][1], math.log(0.5), rel_tol=1e-5)
