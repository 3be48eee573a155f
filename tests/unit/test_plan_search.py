import itertools
import json
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helixd.ids import NodeId
from helixd.layers import LayerRange
from helixd.plan import milp
from helixd.plan.bounds import capacity_bound, pattern_bound
from helixd.plan.cluster.clusterfile import parse_cluster
from helixd.plan.cluster.spec import COORDINATOR, ClusterSpec, LinkSpec, NodeSpec
from helixd.plan.graph.flow import FlowModel
from helixd.plan.holding import Holding
from helixd.plan.planner import plan_cluster
from helixd.plan.search.arrange import Arrangement, stages_of
from helixd.plan.search.cover import CoverSearch, least_cover
from helixd.plan.search.stages import best_cover, cover, few_kinds, kinds_of, lay_out
from tests.unit.plan_worlds import cluster, equal_nodes, node, shared_clusters


def test_a_program_is_solved_with_a_bound_and_infeasible_is_none() -> None:
    program = milp.Program()
    x = program.column(-3.0, upper=4.0, integer=True)
    y = program.column(-2.0, upper=4.0, integer=True)
    program.row([x, y], [2.0, 1.0], upper=7.0)
    found = milp.solve(program)
    assert found is not None
    assert found.optimal
    assert found.values == pytest.approx((2.0, 3.0))
    assert found.bound <= found.cost + 1e-6
    program.row([x], [1.0], lower=9.0)
    assert milp.solve(program) is None


@st.composite
def small_fleets(draw: st.DrawFn) -> ClusterSpec:
    num_layers = draw(st.integers(2, 5))
    nodes = []
    for i in range(draw(st.integers(1, 4))):
        most = draw(st.integers(1, min(3, num_layers)))
        nodes.append(
            node(f"n{i}", draw(st.lists(st.sampled_from([1.0, 3.0, 10.0, 25.0]), min_size=most, max_size=most)))
        )
    return cluster(nodes, num_layers)


@settings(max_examples=25, deadline=None)
@given(small_fleets())
def test_no_placement_exceeds_the_bounds(spec: ClusterSpec) -> None:
    holding = Holding(spec)
    names = [n.id for n in holding.usable()]
    options = [(None, *holding.options(name)) for name in names]
    best = max(
        least_cover(holding, {n: held for n, held in zip(names, chosen, strict=True) if held is not None})
        for chosen in itertools.product(*options)
    )
    loose = capacity_bound(holding)
    sharp = pattern_bound(holding, loose, 0.0)
    assert best <= sharp * (1 + 1e-6) + 1e-9
    assert sharp <= loose


def test_the_pattern_bound_knows_that_nodes_are_whole() -> None:
    # Three nodes of 10 tokens/s over 2 layers: 1.5 nodes a layer in fractions, one in truth.
    holding = Holding(cluster([node(f"n{i}", [10.0]) for i in range(3)], 2))
    assert capacity_bound(holding) >= 10
    assert pattern_bound(holding, 15.0, 9.9) == pytest.approx(10, rel=2e-3)


def test_stages_cover_all_layers_with_the_nodes_there_are() -> None:
    holding = Holding(cluster([*equal_nodes(4, 3), node("big", [900.0, 800.0, 700.0, 600.0, 500.0])], 9))
    kinds = kinds_of(holding)
    assert sorted(len(kind.nodes) for kind in kinds) == [1, 4]
    found = best_cover(kinds, 9, capacity_bound(holding))
    assert found is not None
    flow, chosen = found
    placement = lay_out(chosen, kinds, 9)
    assert least_cover(holding, placement) >= flow * (1 - 1e-6)
    assert cover(kinds, 9, flow * 1.01) is None
    assert all(holding.allows(name, held) for name, held in placement.items())


def test_fewest_stages_are_fewer_when_less_flow_is_asked() -> None:
    kinds = kinds_of(Holding(cluster([node(f"n{i}", [1000, 400, 200, 100]) for i in range(8)], 8)))
    thin = cover(kinds, 8, 1000, fewest=True)
    thick = cover(kinds, 8, 500, fewest=True)
    slow = cover(kinds, 8, 300, fewest=True)
    assert thin is not None
    assert thick is not None
    assert slow is not None
    assert (len(thin), len(slow)) == (8, 2)
    assert len(slow) < len(thick) < len(thin)


def test_wide_asks_for_stages_of_several_nodes() -> None:
    kinds = kinds_of(Holding(cluster(equal_nodes(6, 4), 4)))
    wide = cover(kinds, 4, 500, wide=2, fewest=True)
    assert wide is not None
    assert sum(sum(stage.counts) > 1 for stage in wide) >= 2


def test_like_kinds_are_merged_and_promise_what_the_weakest_can() -> None:
    nodes = [node(f"n{i}", [100.0 + i, 50.0 + i]) for i in range(12)]
    merged = few_kinds(kinds_of(Holding(cluster(nodes, 4))), limit=3)
    assert len(merged) == 3
    assert sum(len(kind.nodes) for kind in merged) == 12
    for kind in merged:
        assert kind.capacity[0] == min(100.0 + int(name[1:]) for name in kind.nodes)


def ring(count: int, num_layers: int, seed: int) -> ClusterSpec:
    """Nodes that see only a few others; a chain through all of them exists, in an order nobody is told."""
    nodes = equal_nodes(count, num_layers // count)
    order: list[NodeId] = [n.id for n in nodes]
    random = Random(seed)
    random.shuffle(order)
    pairs = set(itertools.pairwise([COORDINATOR, *order, COORDINATOR]))
    for a in order:
        pairs |= {(a, b) for b in random.sample(order, 3) if a != b}
    return cluster(nodes, num_layers, tuple(LinkSpec(a, b, 1e9, 0.001) for a, b in sorted(pairs)))


@pytest.mark.parametrize("seed", range(3))
def test_a_chain_hidden_among_few_links_is_found(seed: int) -> None:
    spec = ring(12, 24, seed)
    plan = plan_cluster(spec, objective="max-flow")
    assert plan.max_flow_tokens_per_s == pytest.approx(600)
    assert plan.upper_bound_tokens_per_s == pytest.approx(600)


def test_a_placement_is_read_as_stages_of_lanes() -> None:
    a, b, c, d, e = (NodeId(name) for name in "abcde")
    whole = {a: LayerRange(0, 4), b: LayerRange(0, 2), c: LayerRange(2, 4), d: LayerRange(4, 5), e: LayerRange(4, 5)}
    assert stages_of(whole) == [(((b, 2), (c, 2)), ((a, 4),)), (((d, 1),), ((e, 1),))]
    assert stages_of({**whole, e: LayerRange(3, 5)}) is None
    assert stages_of({**whole, e: LayerRange(1, 4)}) is None
    assert stages_of({a: LayerRange(0, 2), b: LayerRange(3, 4)}) is None
    assert stages_of({}) == []


def test_lanes_are_arranged_with_the_links_inside_them() -> None:
    # "big" holds all four layers; beside it two small ones, of which only n2 reaches n1.
    curve = [300.0, 150.0, 75.0, 50.0]
    nodes = [node("big", [400.0, 200.0, 150.0, 100.0]), *(node(f"n{i}", curve) for i in range(3))]
    ends = [n.id for n in nodes]
    links = [LinkSpec(COORDINATOR, a, 1e9, 0.01) for a in ends] + [LinkSpec(a, COORDINATOR, 1e9, 0.01) for a in ends]
    holding = Holding(cluster(nodes, 4, (*links, LinkSpec(ends[3], ends[2], 1e9, 0.01))))
    flows = FlowModel(holding.spec)
    arrangement = Arrangement(holding, flows, [(((ends[0], 4),), ((ends[1], 2), (ends[2], 2)))], 250.0)
    assert arrangement.anneal(3000, seed=0) == pytest.approx(0, abs=1e-6)
    assert arrangement.placement() == {ends[0]: LayerRange(0, 4), ends[3]: LayerRange(0, 2), ends[2]: LayerRange(2, 4)}
    assert flows.value(arrangement.placement()) == pytest.approx(250)


def test_arranging_puts_several_nodes_on_both_sides_of_slow_links() -> None:
    # Two regions; one link across carries 60 tokens/s, two nodes on each side make 240.
    nodes: list[NodeSpec] = list(equal_nodes(8, 2, power=200.0))
    ends = [n.id for n in nodes]
    links = tuple(
        LinkSpec(a, b, 6e4 if (a in ends[:4]) != (b in ends[:4]) else 1e9, 0.01)
        for a in [*ends, COORDINATOR]
        for b in [*ends, COORDINATOR]
        if a != b and COORDINATOR not in (a, b)
    ) + tuple(link for e in ends for link in (LinkSpec(COORDINATOR, e, 1e9, 0.01), LinkSpec(e, COORDINATOR, 1e9, 0.01)))
    holding = Holding(cluster(nodes, 8, links))
    flows = FlowModel(holding.spec)
    mixed = [(((ends[i], 2),), ((ends[i + 4], 2),)) for i in range(4)]
    arrangement = Arrangement(holding, flows, mixed, 200.0)
    assert arrangement.anneal(5000, seed=1) == pytest.approx(0, abs=1e-6)
    placement = arrangement.placement()
    assert flows.value(placement) == pytest.approx(200)
    assert sorted(placement) == sorted(ends)


def test_cover_search_honours_pins_and_is_the_same_for_a_seed() -> None:
    nodes = list(equal_nodes(5, 4))
    pinned = NodeSpec(nodes[0].id, nodes[0].profile, fixed_range=LayerRange(2, 4))
    holding = Holding(cluster([pinned, *nodes[1:]], 8))
    found = [CoverSearch(holding, seed=5).run(600, sweeps=30) for _ in range(2)]
    assert found[0] == found[1]
    assert found[0][nodes[0].id] == LayerRange(2, 4)
    assert least_cover(holding, found[0]) > 0


@pytest.mark.parametrize(
    ("name", "flow", "gap"),
    [
        ("distributed24-llama70b", 1754.0, 1e-6),
        ("sparse-single24-llama70b", 2045.64, 1e-6),
        ("sparse-distributed24-llama70b", 1754.0, 1e-6),
        ("distributed24-llama30b", 1517.0, 1e-6),
        ("single24-llama30b", 1517.0, 1e-3),
    ],
)
def test_slow_and_missing_links_are_planned_around(name: str, flow: float, gap: float) -> None:
    spec = parse_cluster(json.loads((shared_clusters() / f"{name}.json").read_text()))
    plan = plan_cluster(spec, objective="max-flow", time_limit_s=2)
    assert plan.max_flow_tokens_per_s >= flow
    assert plan.upper_bound_tokens_per_s is not None
    assert plan.max_flow_tokens_per_s >= plan.upper_bound_tokens_per_s * (1 - gap)
    assert FlowModel(spec).value(plan.placement) == pytest.approx(plan.max_flow_tokens_per_s)
