"""The cheapest pairing, against all pairings."""

from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helixd.plan.assign import assign


@given(
    st.integers(0, 5).flatmap(
        lambda n: st.lists(
            st.lists(st.one_of(st.integers(0, 3), st.floats(0, 1e11)), min_size=n, max_size=n), min_size=n, max_size=n
        )
    )
)
def test_it_is_as_cheap_as_the_cheapest_of_all(costs: list[list[float]]) -> None:
    chosen = assign(costs)
    count = len(costs)
    assert sorted(chosen) == list(range(count))
    least = min(sum(costs[i][order[i]] for i in range(count)) for order in permutations(range(count)))
    assert sum(costs[i][chosen[i]] for i in range(count)) == pytest.approx(least, rel=1e-9, abs=1e-3)
