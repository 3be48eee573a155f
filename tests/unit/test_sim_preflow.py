"""Preflow push gives a max flow, whatever the order of its arcs, and not always the same one."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helixd.plan.graph.flow import FlowModel
from helixd.plan.graph.network import Network
from helixd.sim.paper_schedule import scheduled_flow
from helixd.sim.preflow import preflow_push
from tests.unit.plan_worlds import ranges
from tests.unit.sim_worlds import timed, world


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 6), st.integers(0, 6), st.floats(0, 100)).filter(lambda arc: arc[0] != arc[1]),
        min_size=1, max_size=24,
    )
)  # fmt: skip
def test_the_flow_is_conserved_within_capacity_and_the_largest(arcs: list[tuple[int, int, float]]) -> None:
    flows = preflow_push(7, arcs, 0, 1)
    network = Network(7)
    for arc in arcs:
        network.add_arc(*arc)
    balance: Counter[int] = Counter()
    for (tail, head, capacity), flow in zip(arcs, flows, strict=True):
        assert -1e-9 <= flow <= capacity * (1 + 1e-9)
        balance[tail] -= flow
        balance[head] += flow
    assert balance[1] == pytest.approx(network.augment(0, 1), abs=1e-6)
    for vertex in range(2, 7):
        assert balance[vertex] == pytest.approx(0.0, abs=1e-6)


def test_the_order_of_arcs_chooses_among_the_max_flows() -> None:
    spec = world([timed(name) for name in "abcd"])
    placement = ranges({"a": (0, 2), "b": (0, 2), "c": (2, 4), "d": (2, 4)})
    value = FlowModel(spec).value(placement)
    found = [scheduled_flow(spec, placement, kind="preflow", seed=seed) for seed in range(8)]
    assert all(flow.value == pytest.approx(value, rel=1e-4) for flow in found)
    assert len({tuple(sorted((edge, round(flow, 3)) for edge, flow in each.edges.items())) for each in found}) > 1
    assert found[3] == scheduled_flow(spec, placement, kind="preflow", seed=3)
