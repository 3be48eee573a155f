import pytest

from helixd.ids import NodeId
from helixd.plan.cluster.spec import COORDINATOR, ClusterSpec, LinkSpec, NodeSpec
from helixd.plan.graph.flow import FlowModel
from helixd.plan.holding import Holding
from helixd.plan.planner import plan_cluster
from helixd.plan.search.regions import islands, part_of, pods, regions
from tests.unit.plan_worlds import cluster, equal_nodes


def in_regions(count: int, size: int, *, thin: float, num_layers: int = 4, most: int = 2) -> ClusterSpec:
    """`size` nodes to a region; activations are 1000 bytes, so `thin` is in thousands of tokens/s."""
    nodes: tuple[NodeSpec, ...] = equal_nodes(count, most)
    at = {n.id: i // size for i, n in enumerate(nodes)}
    links = [LinkSpec(a, b, 1e9 if at[a] == at[b] else thin, 0.01) for a in at for b in at if a != b]
    links += [LinkSpec(COORDINATOR, a, 1e9, 0.01) for a in at] + [LinkSpec(a, COORDINATOR, 1e9, 0.01) for a in at]
    return cluster(nodes, num_layers, tuple(links))


@pytest.mark.parametrize(("thin", "found"), [(1e5, 3), (2.4e8, 3), (2.6e8, 1), (1e9, 1)])
def test_regions_are_where_links_are_four_times_slower(thin: float, found: int) -> None:
    spec = in_regions(9, 3, thin=thin)
    groups = regions(Holding(spec), FlowModel(spec))
    assert len(groups) == found
    assert sorted(n for group in groups for n in group) == sorted(n.id for n in spec.nodes)


def test_islands_are_joined_by_a_link_in_either_direction() -> None:
    nodes = equal_nodes(4, 2)
    links = (LinkSpec(NodeId("n1"), NodeId("n0"), 1e6, 0.0), LinkSpec(NodeId("n2"), NodeId("n3"), 9e5, 0.0))
    flows = FlowModel(cluster(nodes, 4, links))
    assert islands(flows, [n.id for n in nodes], 1000.0) == (("n0", "n1"), ("n2",), ("n3",))
    assert islands(flows, [n.id for n in nodes], 900.0) == (("n0", "n1"), ("n2", "n3"))


def test_regions_too_small_for_the_model_make_one_pod_together() -> None:
    spec = in_regions(9, 3, thin=1e5, num_layers=6)
    holding = Holding(spec)
    groups = (tuple(n.id for n in spec.nodes[:3]), tuple(n.id for n in spec.nodes[3:5]), (spec.nodes[5].id,))
    assert pods(holding, groups) == (groups[0], (*groups[1], *groups[2]))
    assert pods(holding, groups[1:2]) == ()


def test_a_part_has_its_own_links_and_the_coordinators() -> None:
    spec = in_regions(4, 2, thin=1e5)
    part = part_of(spec, ["n0", "n1"])
    assert {n.id for n in part.nodes} == {"n0", "n1"}
    assert len(part.links) == 2 + 4


def test_many_regions_with_hardly_a_link_between_are_a_pipeline_each() -> None:
    spec = in_regions(72, 6, thin=1e2)
    plan = plan_cluster(spec, objective="max-flow", time_limit_s=3)
    alone = plan_cluster(part_of(spec, [n.id for n in spec.nodes[:6]]), objective="max-flow", time_limit_s=1)
    assert plan.max_flow_tokens_per_s >= 12 * alone.max_flow_tokens_per_s * (1 - 1e-9)
    assert plan.method == "pipelines by region"
