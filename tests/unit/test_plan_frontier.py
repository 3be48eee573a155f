import json

import pytest

from helixd.plan.cluster.clusterfile import parse_cluster
from helixd.plan.frontier import Depth, fewest_stages, frontier, pareto
from helixd.plan.holding import Holding
from helixd.plan.search.cover import least_cover
from tests.unit.plan_worlds import cluster, equal_nodes, node, shared_clusters


def test_the_frontier_falls_in_flow_and_in_depth() -> None:
    holding = Holding(cluster([node(f"n{i}", [1000, 400, 200, 100]) for i in range(8)], 8))
    found = frontier(holding, least=0.1)
    assert [d.stages for d in found] == [8, 4, 3, 2]
    assert [d.flow_tokens_per_s for d in found] == pytest.approx([1000, 800, 600, 400])
    assert all(least_cover(holding, d.placement) == pytest.approx(d.flow_tokens_per_s) for d in found)


def test_no_stages_no_frontier() -> None:
    holding = Holding(cluster(equal_nodes(2, 2), 8))
    assert frontier(holding) == ()
    assert fewest_stages(holding, 1.0) is None


def test_large_fleets_have_a_frontier_too() -> None:
    curve = [1000 / j**1.3 for j in range(1, 7)]
    found = frontier(Holding(cluster([node(f"n{i}", curve) for i in range(80)], 24, ())), steps=4)
    assert len(found) >= 3
    assert found[0].stages > found[-1].stages


def test_of_equal_depth_the_thicker_is_kept() -> None:
    depths = [Depth(5.0, 3, {}), Depth(9.0, 3, {}), Depth(9.0, 4, {}), Depth(2.0, 1, {}), Depth(1.0, 1, {})]
    assert pareto(depths) == (depths[1], depths[3])


@pytest.mark.parametrize(
    ("name", "flow", "most"),
    [
        ("single24-llama70b", 1289, 12),
        ("single24-llama70b", 1476, 13),
        ("single24-llama70b", 1754, 20),
        ("heterogeneous42-llama70b", 4892, 14),
        ("heterogeneous42-llama70b", 5500, 18),
    ],
)
def test_published_clusters_need_few_stages(name: str, flow: float, most: int) -> None:
    spec = parse_cluster(json.loads((shared_clusters() / f"{name}.json").read_text()))
    found = fewest_stages(Holding(spec), flow)
    assert found is not None
    assert found.flow_tokens_per_s >= flow
    assert found.stages <= most
