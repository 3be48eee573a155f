from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helixd.errors import NoRoute
from helixd.ids import Attempt, NodeId, SequenceId
from helixd.plan.cluster.spec import COORDINATOR
from helixd.plan.plan import Hop
from helixd.route.choosers import (
    FixedRoundRobin,
    FlowShares,
    HopChooser,
    RandomHop,
    ShortestQueue,
    Swarm,
)
from helixd.route.router import PREFILL_LIMIT_TOKENS, SLACK_TOKENS, Router
from tests.unit.test_route_router import SOURCE, plan_of, two_by_three

A, B, C = NodeId("a"), NodeId("b"), NodeId("c")
EVERYBODY = (A, B, C)


def take(chooser: HopChooser, cost: float = 1.0, allowed: tuple[NodeId, ...] = EVERYBODY) -> NodeId:
    hop = chooser.choose(COORDINATOR, allowed, cost)
    chooser.charge(COORDINATOR, hop, allowed, cost)
    return hop


def fan(*weights: float) -> dict[NodeId, tuple[Hop, ...]]:
    return {COORDINATOR: tuple(Hop(node, w) for node, w in zip(EVERYBODY, weights, strict=False))}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(0.1, 100), min_size=2, max_size=3),
    st.lists(st.tuples(st.integers(1, 2000), st.integers(0, 400)), min_size=1, max_size=120),
    st.sampled_from([0.0, 500.0, SLACK_TOKENS]),
)
def test_shares_stay_within_the_slack_of_the_flow(
    weights: list[float], requests: list[tuple[int, int]], slack: float
) -> None:
    """Prompt and decode work of every hop is within a bound of its share of all work, however long it goes on."""
    chooser = FlowShares(fan(*weights), COORDINATOR, slack_tokens=slack)
    allowed = EVERYBODY[: len(weights)]
    work: Counter[NodeId] = Counter()
    largest = max(max(pair) for pair in requests)
    for prompt, output in requests:
        hop = take(chooser, prompt, allowed)
        chooser.follow(COORDINATOR, hop, allowed, output)
        work[hop] += prompt + output
        total = sum(work.values())
        for node, weight in zip(allowed, weights, strict=True):
            bound = slack + (len(weights) + 1) * 2 * largest
            assert abs(work[node] - total * weight / sum(weights)) <= bound


def test_among_hops_near_their_share_the_one_that_is_done_first_is_taken() -> None:
    chooser = FlowShares(fan(2.0, 1.0), COORDINATOR, slack_tokens=10_000)
    both = (A, B)
    # A is twice as fast: it takes two for one of B, and all of them once it has nothing left to do.
    assert [take(chooser, 100, both) for _ in range(3)] == [A, A, B]
    for _ in range(2):
        chooser.prefilled(A, 100)
    assert take(chooser, 100, both) == A
    assert FlowShares(fan(2.0, 1.0), COORDINATOR).choose(COORDINATOR, (B,), 1) == B


def test_measured_queues_are_gone_by_where_they_are_known() -> None:
    rows = {A: 500.0, B: 0.0}
    chooser = FlowShares(fan(2.0, 1.0), COORDINATOR, slack_tokens=10_000, queue_of=lambda node: rows[node])
    assert take(chooser, 100, (A, B)) == B
    rows[A] = 50.0
    assert take(chooser, 100, (A, B)) == A


def test_the_slack_is_gone_when_kv_is_half_full() -> None:
    fill = {A: 0.0, B: 0.0, C: 0.0}
    chooser = FlowShares(fan(1.0, 1.0), COORDINATOR, slack_tokens=10_000, fill_of=lambda node: fill[node])
    both = (A, B)
    for _ in range(6):
        # B never gets its prefill done: as long as there is slack, A takes the next one.
        hop = take(chooser, 100, both)
        if hop == A:
            chooser.prefilled(A, 100)
    ahead = take(chooser, 100, both)
    assert ahead == A
    fill[B] = 0.5
    assert [take(chooser, 100, both) for _ in range(4)].count(B) >= 3


def test_swarm_prefers_links_that_were_measured_fast() -> None:
    chooser = Swarm()
    assert {take(chooser) for _ in range(3)} == set(EVERYBODY)
    for _ in range(30):
        chooser.measured(COORDINATOR, A, 0.01)
        chooser.measured(COORDINATOR, B, 1.0)
        chooser.measured(COORDINATOR, C, 1.0)
    drawn = Counter(take(chooser) for _ in range(300))
    assert drawn[A] > 20 * max(drawn[B], drawn[C])
    chooser.follow(COORDINATOR, A, EVERYBODY, 1e9)
    assert drawn[B] >= 1


def test_random_takes_everybody_alike_and_repeats_for_a_seed() -> None:
    first, again = ([take(chooser) for _ in range(300)] for chooser in (RandomHop(1), RandomHop(1)))
    assert first == again
    assert min(Counter(first).values()) > 60


def test_the_shortest_queue_is_taken_ties_at_random() -> None:
    queues = {A: 2.0, B: 1.0, C: 1.0}
    chooser = ShortestQueue(lambda node: queues[node], 1)
    assert {take(chooser) for _ in range(30)} == {B, C}
    queues[C] = 0.0
    assert take(chooser) == C


def test_round_robin_goes_around_whatever_nodes_can_carry() -> None:
    chooser = FixedRoundRobin()
    assert [take(chooser, cost) for cost in (1, 100, 1, 1, 1, 50)] == [A, B, C, A, B, C]


@pytest.mark.parametrize(
    "chooser", [Swarm(), RandomHop(1), ShortestQueue(lambda node: 0.0, 1), FixedRoundRobin()]
)  # fmt: skip
def test_a_router_draws_by_any_of_them_under_masks_and_kv(chooser: HopChooser) -> None:
    plan = two_by_three()
    router = Router(plan, dict.fromkeys(plan.placement, 4000), chooser=chooser)
    used = Counter(node for i in range(40) for node in draw_and_free(router, i))
    assert set(used) == set(plan.placement)
    masked = frozenset({NodeId("a0"), NodeId("b1")})
    assert not masked & set(draw_and_free(router, 99, masked))
    assert router.ledger.total_used() == 0


def draw_and_free(router: Router, number: int, masked: frozenset[NodeId] = frozenset()) -> tuple[NodeId, ...]:
    route = router.draw(SequenceId(number), 50, 10, masked_nodes=masked)
    router.count_decode(route, 10)
    router.release(SequenceId(number))
    return route.nodes


def test_prompts_in_prefill_are_bounded_on_both_sides_of_the_limit() -> None:
    plan = two_by_three()
    router = Router(plan, dict.fromkeys(plan.placement, 10**9), prefill_limit_tokens=1000)
    router.draw(SequenceId(1), 600, 10)
    router.draw(SequenceId(2), 400, 10)
    with pytest.raises(NoRoute, match="being computed") as full:
        router.draw(SequenceId(3), 1, 10)
    assert full.value.cause == "kv"
    router.prefilled(SequenceId(1))
    router.prefilled(SequenceId(1))
    router.draw(SequenceId(3), 600, 10)
    router.release(SequenceId(2))
    router.draw(SequenceId(4), 400, 10)
    with pytest.raises(NoRoute):
        router.draw(SequenceId(5), 1, 10)


def test_a_prompt_over_the_limit_goes_when_it_is_alone() -> None:
    plan = two_by_three()
    router = Router(plan, dict.fromkeys(plan.placement, 10**9))
    router.draw(SequenceId(1), 2 * PREFILL_LIMIT_TOKENS, 10)
    with pytest.raises(NoRoute):
        router.draw(SequenceId(2), 1, 1)
    router.prefilled(SequenceId(1), Attempt(1))
    with pytest.raises(NoRoute):
        router.draw(SequenceId(2), 1, 1)
    router.prefilled(SequenceId(1), Attempt(0))
    router.draw(SequenceId(2), 1, 1)


def test_a_prompt_goes_to_the_pipeline_whose_prefill_is_done() -> None:
    plan = plan_of(
        2,
        {"a": (0, 2), "b": (0, 2)},
        {SOURCE: {"a": 1.0, "b": 1.0}, "a": {SOURCE: 1.0}, "b": {SOURCE: 1.0}},
    )
    router = Router(plan, dict.fromkeys(plan.placement, 10**9))
    first = router.draw(SequenceId(1), 2000, 10).nodes
    for number in range(2, 6):
        # The other pipeline is quick with its prompts; the first one is still at its long one.
        assert router.draw(SequenceId(number), 100, 10).nodes != first
        router.prefilled(SequenceId(number))
