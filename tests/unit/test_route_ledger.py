import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helixd.errors import OutOfKv
from helixd.ids import Attempt, NodeId, SequenceId
from helixd.route.ledger import KvLedger

A, B = NodeId("a"), NodeId("b")
ONE, TWO = SequenceId(1), SequenceId(2)


@pytest.mark.parametrize(("tokens", "fits"), [(40, True), (41, False)])
def test_the_high_water_mark_on_both_sides(tokens: int, fits: bool) -> None:
    ledger = KvLedger({A: 100}, high_water=0.9)
    ledger.reserve(ONE, A, 1, 10)
    assert ledger.fits(A, 2, tokens) is fits


@pytest.mark.parametrize(("tokens", "fits"), [(50, True), (51, False)])
def test_alone_a_sequence_may_take_all(tokens: int, fits: bool) -> None:
    ledger = KvLedger({A: 100}, high_water=0.5)
    assert ledger.fits(A, 2, tokens) is fits
    assert ledger.affordable_tokens(A, 2) == 50


def test_kv_is_counted_in_whole_pages() -> None:
    ledger = KvLedger({A: 1000}, high_water=1.0, page_tokens=64)
    assert ledger.affordable_tokens(A, 6) == 128
    assert ledger.fits(A, 6, 128)
    assert not ledger.fits(A, 6, 129)
    ledger.reserve(ONE, A, 3, 65)
    assert ledger.used(A) == 3 * 128
    assert ledger.grow(ONE, 128) == ()
    assert ledger.used(A) == 3 * 128
    assert ledger.grow(ONE, 129) == ()
    assert ledger.used(A) == 3 * 192
    assert ledger.grow(ONE, 321) == (A,)
    assert ledger.release(ONE, A) == 3 * 384
    with pytest.raises(ValueError, match="page_tokens"):
        KvLedger({}, page_tokens=0)


def test_what_does_not_fit_is_refused_and_leaves_no_trace() -> None:
    ledger = KvLedger({A: 100})
    with pytest.raises(OutOfKv, match="node a has no room for 3 layers x 50 tokens"):
        ledger.reserve(ONE, A, 3, 50)
    with pytest.raises(OutOfKv):
        ledger.reserve(ONE, B, 1, 1)
    assert ledger.total_used() == 0


def test_reserving_twice_is_a_mistake() -> None:
    ledger = KvLedger({A: 100})
    ledger.reserve(ONE, A, 1, 1)
    with pytest.raises(ValueError, match="already"):
        ledger.reserve(ONE, A, 1, 1)
    ledger.reserve(ONE, A, 1, 1, attempt=Attempt(1))
    assert ledger.holders(A) == ((ONE, 0), (ONE, 1))


def test_growth_follows_the_tokens_and_tells_who_is_over() -> None:
    ledger = KvLedger({A: 100, B: 1000})
    ledger.reserve(ONE, A, 2, 20)
    ledger.reserve(ONE, B, 5, 20)
    assert ledger.grow(ONE, 19) == ()
    assert ledger.used(A) == 40
    assert ledger.grow(ONE, 50) == ()
    assert ledger.used(A) == 100
    assert ledger.grow(ONE, 51) == (A,)
    assert ledger.over() == (A,)
    assert ledger.release(ONE, A) == 102
    assert ledger.release(ONE, B) == 255
    assert ledger.grow(ONE, 99) == ()


def test_a_new_life_of_a_node_holds_nothing() -> None:
    ledger = KvLedger({A: 100, B: 100})
    ledger.reserve(ONE, A, 1, 10)
    ledger.reserve(TWO, A, 1, 10)
    ledger.reserve(TWO, B, 1, 10)
    assert ledger.forget_node(A) == 20
    assert ledger.nodes_of(TWO) == (B,)
    assert ledger.release_everywhere(TWO) == 10
    assert ledger.total_used() == 0


@pytest.mark.parametrize("mark", [0.0, 1.1])
def test_high_water_is_a_share(mark: float) -> None:
    with pytest.raises(ValueError, match="high_water"):
        KvLedger({}, high_water=mark)


STEPS = st.lists(
    st.tuples(st.sampled_from(["reserve", "grow", "release", "forget"]), st.integers(0, 3), st.integers(1, 30)),
    max_size=60,
)


@settings(max_examples=100, deadline=None)
@given(STEPS)
def test_never_over_committed_by_reserving_and_exact_to_the_last_token(steps: list[tuple[str, int, int]]) -> None:
    ledger = KvLedger({A: 120, B: 60}, high_water=0.8)
    model: dict[tuple[int, str], tuple[int, int]] = {}
    for action, who, amount in steps:
        sequence, node = SequenceId(who), (A, B)[amount % 2]
        if action == "reserve" and (who, node) not in model:
            used = ledger.used(node)
            try:
                ledger.reserve(sequence, node, 2, amount)
            except OutOfKv:
                assert used + 2 * amount > ledger.capacity(node) * (0.8 if used else 1)
            else:
                model[who, node] = (2, amount)
                assert ledger.used(node) <= ledger.capacity(node)
        elif action == "grow":
            ledger.grow(sequence, amount)
            model = {k: (n, max(t, amount)) if k[0] == who else (n, t) for k, (n, t) in model.items()}
        elif action == "release":
            layers, tokens = model.pop((who, node), (0, 0))
            assert ledger.release(sequence, node) == layers * tokens
        elif action == "forget":
            gone = [k for k in model if k[1] == node]
            assert ledger.forget_node(node) == sum(model[k][0] * model[k][1] for k in gone)
            for key in gone:
                del model[key]
        for where in (A, B):
            assert ledger.used(where) == sum(n * t for (_, held), (n, t) in model.items() if held == where)
