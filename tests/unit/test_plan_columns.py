import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helixd.plan.cluster.spec import ClusterSpec
from helixd.plan.graph.flow import FlowModel
from helixd.plan.holding import Holding
from helixd.plan.planner import plan_cluster
from helixd.plan.search.columns import StageColumns
from helixd.plan.search.cover import least_cover
from helixd.plan.search.lanes import LaneStage, lanes_of, lay_out_lanes
from helixd.plan.search.stages import kinds_of
from tests.unit.plan_worlds import cluster, equal_nodes, node


def fleet(count: int, num_layers: int = 20) -> ClusterSpec:
    """Three types, in turn, with T(j) a little worse than power / j."""
    curves = [[power / j**1.05 for j in range(1, most + 1)] for power, most in ((3000, 8), (1400, 6), (600, 3))]
    return cluster([node(f"n{i:03}", curves[i % 3]) for i in range(count)], num_layers, ())


def test_lanes_let_small_nodes_stand_beside_a_large_one() -> None:
    # Beside "big", which holds all six layers, the two others make a second lane of three each.
    nodes = [node("big", [600, 300, 200, 150, 120, 100]), node("s0", [150, 120, 100]), node("s1", [150, 120, 100])]
    holding = Holding(cluster(nodes, 6))
    kinds = kinds_of(holding)
    found = StageColumns(kinds, 6).best(150, 210)
    assert found is not None
    placement = lay_out_lanes(found[1], kinds, 6)
    assert FlowModel(holding.spec).value(placement) == pytest.approx(200)


def test_a_lane_is_cut_where_its_slowest_node_is_fastest() -> None:
    kinds = kinds_of(Holding(cluster([node("fast", [100, 50, 30, 20]), node("slow", [60, 25, 10, 5])], 4)))
    pairs = [lane for lane in lanes_of(kinds, 4, 2) if len(lane.kinds) == 2]
    assert [(lane.layers, lane.rate) for lane in pairs] == [((3, 1), 30)]


@settings(max_examples=25, deadline=None)
@given(st.integers(3, 40), st.floats(20, 3000), st.integers(1, 3), st.integers(1, 2), st.booleans())
def test_a_cover_takes_no_more_nodes_than_there_are_and_carries_what_is_asked(
    count: int, flow: float, length: int, min_width: int, fewest: bool
) -> None:
    holding = Holding(fleet(count))
    kinds = kinds_of(holding)
    stages = StageColumns(kinds, 20, length=length, min_width=min_width).cover(flow, fewest=fewest)
    if stages is None:
        return
    used = [kind for stage in stages for lane in stage.lanes for kind in lane.kinds]
    assert all(used.count(k) <= len(kind.nodes) for k, kind in enumerate(kinds))
    assert sum(stage.layers for stage in stages) >= 20
    assert all(stage.flow() >= flow * (1 - 1e-6) for stage in stages)
    assert all(len(stage.lanes) >= min_width for stage in stages)
    placement = lay_out_lanes(stages, kinds, 20)
    assert all(holding.allows(name, held) for name, held in placement.items())
    assert least_cover(holding, placement) >= flow * (1 - 1e-6)


def brute_cover(rates: list[list[float]], num_layers: int) -> float:
    """The best least cover over all intervals of a few nodes."""
    options = [
        [(0, 0, 0.0)] + [(s, s + j, curve[j - 1]) for j in range(1, len(curve) + 1) for s in range(num_layers - j + 1)]
        for curve in rates
    ]
    return max(
        min(sum(rate for start, end, rate in chosen if start <= layer < end) for layer in range(num_layers))
        for chosen in itertools.product(*options)
    )


def test_a_best_cover_of_a_few_nodes_is_the_best_there_is() -> None:
    rates = [[90.0, 45.0, 30.0], [90.0, 45.0, 30.0], [60.0, 30.0], [60.0, 30.0]]
    holding = Holding(cluster([node(f"n{i}", curve) for i, curve in enumerate(rates)], 4))
    kinds = kinds_of(holding)
    found = StageColumns(kinds, 4, length=3).best(0, 100)
    assert found is not None
    assert found[0] == pytest.approx(brute_cover(rates, 4))


def test_less_flow_takes_fewer_stages() -> None:
    columns = StageColumns(kinds_of(Holding(fleet(90))), 20, length=1)
    depths = [len(stages) for flow in (7000, 6000, 3000) if (stages := columns.cover(flow, fewest=True))]
    assert len(depths) == 3
    assert depths == sorted(depths, reverse=True)
    assert depths[0] > depths[-1]


def test_stages_are_equal_for_equal_input() -> None:
    def run() -> tuple[float, tuple[LaneStage, ...]] | None:
        return StageColumns(kinds_of(Holding(fleet(70))), 20, seed=3).best(0, 8000)

    assert run() == run() is not None


def test_a_large_cluster_comes_near_its_bound_and_honours_its_ends() -> None:
    nodes = [*equal_nodes(40, 5), *(node(f"m{i}", [700 / j for j in range(1, 4)], kv=[3e4] * 3) for i in range(40))]
    spec = cluster(nodes, 24, embedding_bytes=2e6, head_bytes=2e6)
    plan = plan_cluster(spec, objective="max-flow", time_limit_s=4)
    holding = Holding(spec)
    assert all(holding.allows(name, held) for name, held in plan.placement.items())
    assert plan.upper_bound_tokens_per_s is not None
    assert 0.95 * plan.upper_bound_tokens_per_s <= plan.max_flow_tokens_per_s <= plan.upper_bound_tokens_per_s
