"""The cheapest lanes for a stage's flow: against every way there is."""

from itertools import product

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from helixd.plan.search.columns import least_costs

ITEMS = st.lists(st.tuples(st.integers(0, 6), st.integers(1, 50)), min_size=1, max_size=3)


@given(st.lists(ITEMS, min_size=1, max_size=3), st.integers(1, 8))
def test_the_cheapest_are_found_for_every_number_of_units(rows: list[list[tuple[int, int]]], top: int) -> None:
    width = max(map(len, rows))
    units = np.array([[u for u, _ in row] + [0] * (width - len(row)) for row in rows], dtype=np.int64)
    costs = np.array([[float(c) for _, c in row] + [0.0] * (width - len(row)) for row in rows])
    choice, least = least_costs(units, costs, top)
    for row, items in enumerate(rows):
        for wanted in range(1, top + 1):
            ways = [
                sum(n * cost for n, (_, cost) in zip(counts, items, strict=True))
                for counts in product(range(top + 1), repeat=len(items))
                if sum(n * gain for n, (gain, _) in zip(counts, items, strict=True)) >= wanted
            ]
            assert least[row, wanted] == min(ways, default=float("inf"))
            if ways:
                last = choice[row, wanted]
                rest = max(0, wanted - units[row, last])
                assert least[row, wanted] == costs[row, last] + least[row, rest]
