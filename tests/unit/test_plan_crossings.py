import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helixd.plan.bounds import capacity_bound, pattern_bound
from helixd.plan.cluster.clusterfile import parse_cluster
from helixd.plan.cluster.spec import COORDINATOR, ClusterSpec, LinkSpec
from helixd.plan.graph.flow import FlowModel
from helixd.plan.holding import Holding
from helixd.plan.planner import plan_cluster
from helixd.plan.search.crossings import cannot_cross
from tests.unit.plan_worlds import cluster, node, shared_clusters


@st.composite
def thinly_linked(draw: st.DrawFn) -> ClusterSpec:
    """Up to four nodes in two regions; links between them carry less than some nodes do, or more, or are missing."""
    num_layers = draw(st.integers(2, 4))
    nodes = []
    for i in range(draw(st.integers(2, 4))):
        most = draw(st.integers(1, num_layers))
        rates = st.lists(st.sampled_from([5.0, 10.0, 20.0, 40.0]), min_size=most, max_size=most)
        nodes.append(node(f"n{i}", draw(rates)))
    ends = [n.id for n in nodes]
    thin = draw(st.sampled_from([3e3, 5e3, 1.2e4]))
    links = [
        LinkSpec(a, b, 1e9 if (i % 2) == (j % 2) else thin, 0.01)
        for i, a in enumerate(ends)
        for j, b in enumerate(ends)
        if a != b and draw(st.integers(0, 9))
    ]
    links += [LinkSpec(COORDINATOR, a, 1e9, 0.01) for a in ends] + [LinkSpec(a, COORDINATOR, 1e9, 0.01) for a in ends]
    return cluster(nodes, num_layers, tuple(links))


def best_of_all(spec: ClusterSpec) -> float:
    holding, flows = Holding(spec), FlowModel(spec)
    names = [n.id for n in holding.usable()]
    options = [(None, *holding.options(name)) for name in names]
    return max(
        flows.value({n: held for n, held in zip(names, chosen, strict=True) if held is not None})
        for chosen in itertools.product(*options)
    )


@settings(max_examples=20, deadline=None)
@given(thinly_linked(), st.sampled_from([0.5, 0.9, 1.0]))
def test_what_some_placement_carries_is_never_proven_impossible(spec: ClusterSpec, share: float) -> None:
    best = best_of_all(spec)
    holding = Holding(spec)
    flows = FlowModel(spec)
    if best > 0:
        assert not cannot_cross(holding, flows, best * share)
    loose = capacity_bound(holding)
    sharp = pattern_bound(holding, loose, 0.0, also=lambda flow: cannot_cross(holding, flows, flow))
    assert best <= sharp * (1 + 1e-6) + 1e-9


def two_sides(thin: float) -> ClusterSpec:
    """Two nodes on either side of a slow link; each alone carries 100 tokens/s through two of eight layers."""
    nodes = [node(f"n{i}", [110.0, 100.0]) for i in range(4)]
    ends = [n.id for n in nodes]
    links = [
        LinkSpec(a, b, 1e9 if (a in ends[:2]) == (b in ends[:2]) else thin, 0.01) for a in ends for b in ends if a != b
    ]
    links += [LinkSpec(COORDINATOR, a, 1e9, 0.01) for a in ends] + [LinkSpec(a, COORDINATOR, 1e9, 0.01) for a in ends]
    return cluster(nodes, 8, tuple(links))


@pytest.mark.parametrize(("thin_tokens_per_s", "crosses"), [(60, False), (99, False), (100, True), (500, True)])
def test_a_chain_of_single_nodes_cannot_cross_a_link_that_is_thinner(thin_tokens_per_s: float, crosses: bool) -> None:
    spec = two_sides(thin_tokens_per_s * 1000)
    assert cannot_cross(Holding(spec), FlowModel(spec), 100.0) is not crosses
    plan = plan_cluster(spec, objective="max-flow", time_limit_s=1)
    assert plan.max_flow_tokens_per_s == pytest.approx(min(100, thin_tokens_per_s))


def test_the_distributed_cluster_is_planned_as_well_as_it_can_be() -> None:
    spec = parse_cluster(json.loads((shared_clusters() / "distributed24-llama70b.json").read_text()))
    holding, flows = Holding(spec), FlowModel(spec)
    assert cannot_cross(holding, flows, 1754.3819)
    assert not cannot_cross(holding, flows, 1754.38)
