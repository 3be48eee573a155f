from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helixd.ids import NodeId
from helixd.route.iwrr import WeightedRoundRobin

WEIGHTS = st.lists(st.floats(0.01, 1000), min_size=1, max_size=8)


def names(count: int) -> list[NodeId]:
    return [NodeId(f"n{i}") for i in range(count)]


def draw(turns: WeightedRoundRobin, allowed: list[NodeId], cost: float = 1.0) -> NodeId:
    node = turns.choose(allowed, cost)
    turns.charge(node, allowed, cost)
    return node


@settings(max_examples=100, deadline=None)
@given(WEIGHTS, st.integers(1, 400))
def test_counts_stay_within_one_draw_per_candidate_of_the_exact_share(weights: list[float], draws: int) -> None:
    everybody = names(len(weights))
    turns = WeightedRoundRobin(dict(zip(everybody, weights, strict=True)))
    counts: Counter[NodeId] = Counter()
    for n in range(1, draws + 1):
        counts[draw(turns, everybody)] += 1
        for node, weight in zip(everybody, weights, strict=True):
            assert abs(counts[node] - n * weight / sum(weights)) <= len(weights)


@settings(max_examples=50, deadline=None)
@given(WEIGHTS, st.lists(st.integers(1, 2000), min_size=1, max_size=200))
def test_load_stays_within_the_largest_cost_per_candidate_of_its_share(weights: list[float], costs: list[int]) -> None:
    everybody = names(len(weights))
    turns = WeightedRoundRobin(dict(zip(everybody, weights, strict=True)))
    load: Counter[NodeId] = Counter()
    for cost in costs:
        load[draw(turns, everybody, cost)] += cost
    for node, weight in zip(everybody, weights, strict=True):
        assert abs(load[node] - sum(costs) * weight / sum(weights)) <= (len(weights) + 1) * max(costs)


def test_draws_are_interleaved_not_in_runs() -> None:
    a, b = names(2)
    turns = WeightedRoundRobin({a: 2.0, b: 1.0})
    assert [draw(turns, [a, b]) for _ in range(6)] == [a, b, a, a, b, a]


def test_under_a_mask_the_others_share_and_a_returning_node_is_not_flooded() -> None:
    a, b, c = names(3)
    turns = WeightedRoundRobin({a: 1.0, b: 1.0, c: 2.0})
    for _ in range(400):
        assert draw(turns, [a, b]) != c
    after = Counter(draw(turns, [a, b, c]) for _ in range(40))
    assert abs(after[c] - 20) <= 3
    assert abs(after[a] - 10) <= 3


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan")])
def test_weights_must_be_positive(weight: float) -> None:
    with pytest.raises(ValueError, match="positive"):
        WeightedRoundRobin({NodeId("a"): weight})


def test_somebody_must_be_allowed() -> None:
    with pytest.raises(ValueError, match="nobody"):
        WeightedRoundRobin({NodeId("a"): 1.0}).choose([])
