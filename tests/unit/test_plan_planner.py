import itertools
import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helixd.ids import NodeId
from helixd.layers import LayerRange
from helixd.plan.cluster.clusterfile import parse_cluster
from helixd.plan.cluster.spec import COORDINATOR, ClusterSpec, LinkSpec, NodeSpec
from helixd.plan.graph.flow import FlowModel
from helixd.plan.holding import Holding
from helixd.plan.plan import Infeasible, Plan, Progress
from helixd.plan.planner import plan_cluster
from tests.unit.plan_worlds import cluster, equal_nodes, full_mesh, node, shared_clusters, without_links


def check(spec: ClusterSpec, plan: Plan) -> None:
    """What every plan must be, whatever made it."""
    holding = Holding(spec)
    for name, held in plan.placement.items():
        assert holding.allows(name, held), (name, held)
    value = FlowModel(spec).value(plan.placement)
    assert plan.max_flow_tokens_per_s == pytest.approx(value, rel=1e-9)
    assert value > 0
    assert plan.upper_bound_tokens_per_s is not None
    assert value <= plan.upper_bound_tokens_per_s * (1 + 1e-9)
    out = sum(hop.flow_tokens_per_s for hop in plan.schedule[COORDINATOR])
    assert out == pytest.approx(value, rel=1e-6)
    for vertex, hops in plan.schedule.items():
        flows = [hop.flow_tokens_per_s for hop in hops]
        assert flows == sorted(flows, reverse=True)
        assert min(flows) > 0
        if vertex != COORDINATOR:
            inward = sum(h.flow_tokens_per_s for hs in plan.schedule.values() for h in hs if h.node == vertex)
            assert inward == pytest.approx(sum(flows), rel=1e-6)


def brute_force(spec: ClusterSpec) -> float:
    holding, flows = Holding(spec), FlowModel(spec)
    options = [
        holding.options(n.id) if holding.must_hold(n.id) else (None, *holding.options(n.id)) for n in holding.usable()
    ]
    names = [n.id for n in holding.usable()]
    return max(
        flows.value({n: held for n, held in zip(names, chosen, strict=True) if held is not None})
        for chosen in itertools.product(*options)
    )


def stage_ends(plan: Plan) -> list[int]:
    return sorted({held.end for held in plan.placement.values()})


def test_one_node_that_holds_all() -> None:
    spec = cluster(equal_nodes(1, 6), 6)
    plan = plan_cluster(spec)
    check(spec, plan)
    assert plan.placement == {"n0": LayerRange(0, 6)}
    assert plan.max_flow_tokens_per_s == pytest.approx(plan.upper_bound_tokens_per_s) == pytest.approx(200)


@pytest.mark.parametrize("objective", ["throughput", "max-flow"])
@pytest.mark.parametrize("num_layers", [6, 12, 30])
def test_six_nodes_of_a_third_each_give_three_stages_of_two(num_layers: int, objective: str) -> None:
    spec = cluster(equal_nodes(6, num_layers // 3), num_layers)
    plan = plan_cluster(spec, objective=objective)
    check(spec, plan)
    third = num_layers // 3
    held = sorted(r.to_pair() for r in plan.placement.values())
    assert held == sorted([(0, third), (third, 2 * third), (2 * third, num_layers)] * 2)
    # Each stage's nodes feed both of the next, so that either may be lost.
    assert all(len(hops) == 2 for vertex, hops in plan.schedule.items() if plan_ends_before(plan, vertex, num_layers))


def plan_ends_before(plan: Plan, vertex: NodeId, num_layers: int) -> bool:
    return vertex == COORDINATOR or plan.placement[vertex].end < num_layers


def test_more_nodes_than_layers() -> None:
    spec = cluster(equal_nodes(9, 1), 2)
    plan = plan_cluster(spec)
    check(spec, plan)
    assert plan.max_flow_tokens_per_s == pytest.approx(4 * 1200)


def test_a_node_that_cannot_hold_a_layer_is_left_out_and_told_so() -> None:
    spec = cluster([*equal_nodes(2, 3), node("tiny", [], max_layers=0, kv=[])], 4)
    plan = plan_cluster(spec)
    check(spec, plan)
    assert "tiny" not in plan.placement
    assert plan.explanations is not None
    assert "cannot hold one layer" in plan.explanations[NodeId("tiny")]


def test_too_little_memory_is_said_in_gib() -> None:
    spec = cluster(equal_nodes(3, 1), 4)
    big = replace(spec, model=replace(spec.model, layer_bytes=2.0**30 * 30.6))
    with pytest.raises(Infeasible, match=r"needs 122\.4 GiB for weights, nodes offer 91\.8 GiB"):
        plan_cluster(big)


def test_zero_bandwidth_is_no_link() -> None:
    nodes = equal_nodes(3, 2)
    links = tuple(
        replace(link, bandwidth_bytes_per_s=0.0) if (link.src, link.dst) == ("n0", "n1") else link
        for link in full_mesh(nodes)
    )
    spec = cluster(nodes, 4, links)
    plan = plan_cluster(spec, objective="max-flow")
    check(spec, plan)
    assert not any(hop.node == "n1" for hop in plan.schedule.get(NodeId("n0"), ()))
    assert plan.max_flow_tokens_per_s == pytest.approx(brute_force(spec))


def test_links_in_one_direction_only_order_the_stages() -> None:
    nodes = equal_nodes(3, 2)
    names = [COORDINATOR, NodeId("n2"), NodeId("n0"), NodeId("n1"), COORDINATOR]
    links = tuple(LinkSpec(a, b, 1e9, 0.001) for a, b in itertools.pairwise(names))
    spec = cluster(nodes, 5, links)
    plan = plan_cluster(spec)
    check(spec, plan)
    assert [plan.placement[NodeId(n)].start for n in ("n2", "n0", "n1")] == sorted(
        held.start for held in plan.placement.values()
    )


@pytest.mark.parametrize(
    ("gone", "says"),
    [
        ([(COORDINATOR, "n0"), (COORDINATOR, "n1")], "reached from the coordinator"),
        ([("n0", COORDINATOR), ("n1", COORDINATOR)], "reach the coordinator"),
        ([("n0", "n1"), ("n1", "n0")], "no chain of them"),
    ],
)
def test_a_cluster_that_is_cut_apart_is_infeasible_and_says_where(gone: list[tuple[str, str]], says: str) -> None:
    spec = without_links(cluster(equal_nodes(2, 2), 4), gone)
    with pytest.raises(Infeasible, match=says):
        plan_cluster(spec)


def test_throughput_that_rises_with_layers_is_used() -> None:
    # Holding two layers is worth more than holding one: T(j) is not monotone.
    spec = cluster([node(f"n{i}", [10.0, 40.0, 5.0, 4.0]) for i in range(2)], 4)
    plan = plan_cluster(spec, objective="max-flow")
    check(spec, plan)
    assert plan.max_flow_tokens_per_s == pytest.approx(40)
    assert all(len(held) == 2 for held in plan.placement.values())


def test_pins_hold() -> None:
    n = equal_nodes(5, 4)
    pinned = (
        replace(n[0], fixed_range=LayerRange(3, 6)),
        replace(n[1], max_layers=1),
        replace(n[2], min_layers=4),
        replace(n[3], exclude=True),
        n[4],
    )
    spec = cluster(pinned, 10)
    for objective in ("throughput", "max-flow", "latency"):
        plan = plan_cluster(spec, objective=objective)
        check(spec, plan)
        assert plan.placement[NodeId("n0")] == LayerRange(3, 6)
        assert len(plan.placement[NodeId("n2")]) == 4
        assert "n3" not in plan.placement
        assert len(plan.placement.get(NodeId("n1"), LayerRange(0, 1))) == 1
        assert plan.explanations is not None
        assert "excluded" in plan.explanations[NodeId("n3")]


@pytest.mark.parametrize(
    "pinned",
    [{"fixed_range": LayerRange(0, 4)}, {"min_layers": 4}, {"max_layers": 1, "min_layers": 2}],
)
def test_a_pin_that_cannot_be_honoured_is_an_error_that_names_the_node(pinned: dict[str, object]) -> None:
    first, *others = equal_nodes(3, 3)
    spec = cluster((replace(first, **pinned), *others), 6)  # type: ignore[arg-type]
    with pytest.raises(Infeasible, match="n0 is pinned"):
        plan_cluster(spec)


def test_embedding_and_head_take_their_room_on_the_ends() -> None:
    # 4 layers fit, but only 2 beside the embedding and 3 beside the head; KV room shrinks by 1000 per layer.
    def ending(name: str) -> NodeSpec:
        return node(name, [8, 4, 2, 1], kv=[3500, 2500, 1500, 500], memory_bytes=4.5e6)

    spec = cluster([ending("a"), ending("b"), ending("c")], 9, embedding_bytes=2e6, head_bytes=1e6)
    plan = plan_cluster(spec)
    check(spec, plan)
    by_start = sorted(plan.placement.values())
    assert [r.to_pair() for r in by_start] == [(0, 2), (2, 6), (6, 9)]
    assert plan.kv_capacity_token_layers is not None
    assert min(plan.kv_capacity_token_layers.values()) > 0
    with pytest.raises(Infeasible):
        plan_cluster(replace(spec, model=replace(spec.model, num_layers=10)))


def test_survive_1_keeps_a_pipeline_whoever_is_lost() -> None:
    curve = [100.0, 50.0, 30.0, 10.0, 8.0, 6.0]
    spec = cluster([node(f"n{i}", curve) for i in range(4)], 6)
    plan = plan_cluster(spec, survive=1)
    check(spec, plan)
    for lost in plan.placement:
        assert FlowModel(spec).value({n: held for n, held in plan.placement.items() if n != lost}) > 0
    with pytest.raises(Infeasible, match="survive 0"):
        plan_cluster(cluster(equal_nodes(2, 3), 6), survive=1)


def test_same_seed_same_plan() -> None:
    spec = cluster([node(f"n{i}", [(90 + 7 * i) / j for j in range(1, 5)]) for i in range(7)], 9)
    assert plan_cluster(spec, seed=3, time_limit_s=0.3) == plan_cluster(spec, seed=3, time_limit_s=0.3)


def test_a_clock_that_has_run_out_still_leaves_a_plan() -> None:
    ticks = itertools.count(step=100)
    spec = cluster(equal_nodes(7, 4), 9)
    plan = plan_cluster(spec, time_limit_s=1, clock=lambda: float(next(ticks)))
    check(spec, plan)
    assert plan.solve_s > 0


def test_progress_rises_to_the_plan_and_its_bound_falls() -> None:
    told: list[Progress] = []
    ticks = itertools.count()
    spec = cluster([node(f"n{i}", [(90 + 7 * i) / j for j in range(1, 5)]) for i in range(9)], 9)
    plan = plan_cluster(
        spec, objective="max-flow", time_limit_s=1e4, clock=lambda: float(next(ticks)), on_progress=told.append
    )
    assert [p.flow for p in told] == sorted(p.flow for p in told)
    assert [p.bound for p in told] == sorted((p.bound for p in told), reverse=True)
    assert [p.elapsed_s for p in told] == sorted(p.elapsed_s for p in told)
    assert (told[-1].flow, told[-1].bound) == (plan.max_flow_tokens_per_s, plan.upper_bound_tokens_per_s)
    assert told[-1].gap == pytest.approx(1 - told[-1].flow / told[-1].bound)
    assert told[-1].method == plan.method


@pytest.mark.parametrize("count", [20, 70])
def test_time_that_is_up_at_once_leaves_a_plan_of_larger_clusters_too(count: int) -> None:
    ticks = itertools.count(step=100)
    spec = cluster(equal_nodes(count, 4), 30)
    plan = plan_cluster(spec, time_limit_s=1, clock=lambda: float(next(ticks)))
    check(spec, plan)


def test_unknown_objective_is_refused() -> None:
    with pytest.raises(ValueError, match="objective"):
        plan_cluster(cluster(equal_nodes(1, 1), 1), objective="speed")


@st.composite
def tiny_clusters(draw: st.DrawFn) -> ClusterSpec:
    num_layers = draw(st.integers(1, 4))
    nodes = []
    for i in range(draw(st.integers(1, 3))):
        most = draw(st.integers(0, num_layers))
        nodes.append(node(f"n{i}", draw(st.lists(st.floats(1, 100), min_size=most, max_size=most))))
    links = tuple(
        replace(link, bandwidth_bytes_per_s=draw(st.sampled_from([0.0, 3e3, 3e4, 1e9])))
        for link in full_mesh(nodes)
        if draw(st.integers(0, 4))
    )
    return cluster(nodes, num_layers, links)


@settings(max_examples=30, deadline=None)
@given(tiny_clusters())
def test_tiny_clusters_come_out_optimal(spec: ClusterSpec) -> None:
    best = brute_force(spec)
    if best <= 0:
        with pytest.raises(Infeasible):
            plan_cluster(spec, objective="max-flow")
        return
    plan = plan_cluster(spec, objective="max-flow")
    check(spec, plan)
    assert plan.max_flow_tokens_per_s == pytest.approx(best, rel=1e-6)
    check(spec, plan_cluster(spec))


@pytest.mark.parametrize(
    ("name", "flow"),
    [("single24-llama70b", 2045.64), ("quality10-llama30b", 286.587), ("heterogeneous42-llama70b", 5900)],
)
def test_published_clusters_beat_the_published_flow(name: str, flow: float) -> None:
    spec = parse_cluster(json.loads((shared_clusters() / f"{name}.json").read_text()))
    plan = plan_cluster(spec, objective="max-flow", time_limit_s=2)
    check(spec, plan)
    assert plan.max_flow_tokens_per_s >= flow
