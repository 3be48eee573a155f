import itertools
import json
from dataclasses import replace
from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helixd.ids import NodeId
from helixd.layers import LayerRange
from helixd.plan.cluster.clusterfile import parse_cluster
from helixd.plan.cluster.spec import ClusterSpec, ModelSpec
from helixd.plan.graph.flow import FlowModel
from helixd.plan.holding import Holding
from helixd.plan.moves import load_bytes, relabelled, reordered, total_bytes
from helixd.plan.plan import Infeasible
from helixd.plan.planner import plan_cluster
from helixd.plan.replan import Replan, lost, replan
from helixd.plan.search.cover import CoverSearch, least_cover
from tests.unit.plan_worlds import cluster, equal_nodes, node, ranges, shared_clusters, without_links

MODEL = ModelSpec("m", 10, 100.0, 1.0, 1.0, embedding_bytes=7.0, head_bytes=3.0)


@pytest.mark.parametrize(
    ("before", "after", "size"),
    [
        (None, (2, 5), 300),
        ((2, 5), (2, 5), 0),
        ((2, 5), None, 0),
        ((2, 5), (4, 8), 300),
        ((2, 5), (5, 6), 100),
        ((2, 9), (3, 5), 0),
        (None, (0, 1), 107),
        ((0, 4), (0, 5), 100),
        ((1, 4), (0, 4), 107),
        ((3, 9), (3, 10), 103),
        ((0, 9), (0, 10), 103),
        (None, (0, 10), 1010),
    ],
)
def test_what_is_not_held_yet_has_to_be_loaded(
    before: tuple[int, int] | None, after: tuple[int, int] | None, size: float
) -> None:
    def held(pair: tuple[int, int] | None) -> LayerRange | None:
        return LayerRange.of(pair) if pair else None

    assert load_bytes(MODEL, held(before), held(after)) == size


@st.composite
def some_ranges(draw: st.DrawFn, names: tuple[str, ...]) -> dict[NodeId, LayerRange]:
    found = {}
    for name in names:
        if draw(st.integers(0, 3)):
            start = draw(st.integers(0, 8))
            found[NodeId(name)] = LayerRange(start, draw(st.integers(start + 1, 10)))
    return found


NAMES = ("a", "b", "c", "d", "e")


@settings(max_examples=80, deadline=None)
@given(some_ranges(NAMES), some_ranges(NAMES))
def test_relabelling_equal_nodes_moves_the_fewest_bytes(
    current: dict[NodeId, LayerRange], wanted: dict[NodeId, LayerRange]
) -> None:
    nodes = [NodeId(name) for name in NAMES]
    found = relabelled(MODEL, current, wanted, [nodes])
    assert sorted(found.values()) == sorted(wanted.values())
    slots = [wanted.get(n) for n in nodes]
    least = min(
        sum(load_bytes(MODEL, current.get(n), held) for n, held in zip(nodes, order, strict=True))
        for order in itertools.permutations(slots)
    )
    assert total_bytes(MODEL, current, found) == pytest.approx(least)


def test_only_equal_nodes_trade() -> None:
    current = ranges({"a": (0, 5), "b": (5, 10), "c": (0, 5)})
    wanted = ranges({"a": (5, 10), "b": (0, 5), "c": (5, 10)})
    found = relabelled(MODEL, current, wanted, [[NodeId("a"), NodeId("b")]])
    assert found == ranges({"a": (0, 5), "b": (5, 10), "c": (5, 10)})


def test_stages_stand_where_their_nodes_hold_them() -> None:
    nodes = equal_nodes(6, 5)
    holding = Holding(cluster(nodes, 12))
    current = ranges({"n0": (0, 2), "n1": (0, 2), "n2": (2, 7), "n3": (7, 12), "n4": (7, 12), "n5": (7, 12)})
    # The same stages the other way round, on other nodes.
    wanted = ranges({"n5": (0, 5), "n1": (0, 5), "n2": (0, 5), "n3": (5, 10), "n4": (10, 12), "n0": (10, 12)})
    found = reordered(holding, current, wanted, [[n.id for n in nodes]])
    assert total_bytes(holding.spec.model, current, found) == 0
    assert least_cover(holding, found) == least_cover(holding, wanted)


def test_ends_that_do_not_fit_are_not_reordered_to() -> None:
    small = node("small", [4, 2], kv=[1500, 1000], memory_bytes=2.4e6)
    big = node("big", [4, 2, 1, 1], kv=[9e3, 8e3, 7e3, 6e3], memory_bytes=9e6)
    holding = Holding(cluster([small, big], 6, embedding_bytes=1e6))
    wanted = ranges({"big": (0, 4), "small": (4, 6)})
    found = reordered(holding, ranges({"big": (2, 6)}), wanted, [[small.id], [big.id]])
    assert found == wanted


@st.composite
def changes(draw: st.DrawFn) -> tuple[ClusterSpec, dict[NodeId, LayerRange]]:
    """A cluster of up to 5 nodes of two types and what its nodes hold: a plan for one node more."""
    count = draw(st.integers(3, 5))
    num_layers = draw(st.integers(4, 7))
    curves = [[draw(st.sampled_from([40.0, 90.0])) / j for j in range(1, num_layers + 1)] for _ in range(2)]
    spec = cluster([node(f"n{i}", curves[i % 2][: draw(st.integers(2, 6))]) for i in range(count)], num_layers)
    if draw(st.booleans()):
        gone = [(f"n{a}", f"n{b}") for a in range(count) for b in range(count) if draw(st.integers(0, 3)) == 0]
        spec = without_links(spec, gone)
    try:
        current = dict(plan_cluster(spec, objective="max-flow", time_limit_s=0.2).placement)
    except Infeasible:
        current = {}
    return lost(spec, NodeId(f"n{draw(st.integers(0, count - 1))}")), current


def check(spec: ClusterSpec, current: dict[NodeId, LayerRange], found: Replan) -> None:
    holding, flows = Holding(spec), FlowModel(spec)
    plan = found.plan
    assert all(holding.allows(n, held) for n, held in plan.placement.items())
    value = flows.value(plan.placement)
    assert 0 < value <= (plan.upper_bound_tokens_per_s or 0) * (1 + 1e-9)
    assert plan.max_flow_tokens_per_s == pytest.approx(value)
    known = {n: held for n, held in current.items() if n in {node.id for node in spec.nodes}}
    moved = {move.node: move for move in found.moves}
    for name in {*known, *plan.placement}:
        before, after = known.get(name), plan.placement.get(name)
        assert (name in moved) == (before != after)
        if name in moved:
            assert (moved[name].before, moved[name].after) == (before, after)
    assert found.load_bytes == pytest.approx(sum(move.load_bytes for move in found.moves))
    assert found.load_s == pytest.approx(max((move.load_s for move in found.moves), default=0.0))
    worths = [option.worth for option in found.options]
    assert worths == sorted(set(worths))
    assert [o.load_bytes for o in found.options] == sorted(o.load_bytes for o in found.options)


@settings(max_examples=12, deadline=None)
@given(changes(), st.sampled_from([inf, 3600.0, 10.0, 0.0]))
def test_any_replan_is_valid_and_says_what_it_moves(
    change: tuple[ClusterSpec, dict[NodeId, LayerRange]], horizon_s: float
) -> None:
    spec, current = change
    try:
        scratch = plan_cluster(spec, objective="max-flow", time_limit_s=0.2)
    except Infeasible:
        with pytest.raises(Infeasible):
            replan(spec, current=current, load_bytes_per_s=1e6, objective="max-flow", time_limit_s=0.2)
        return
    found = replan(
        spec, current=current, load_bytes_per_s=1e6, horizon_s=horizon_s, objective="max-flow", time_limit_s=0.2
    )
    check(spec, current, found)
    if horizon_s == inf:
        assert found.plan.max_flow_tokens_per_s >= 0.98 * scratch.max_flow_tokens_per_s


def test_links_that_lead_one_way_only_say_who_stands_first() -> None:
    nodes = [node(name, [90, 20, 13, 5]) for name in ("n0", "n1")]
    spec = without_links(cluster(nodes, 4), [("n1", "n0")])
    # To stand the other way round would move nothing, and serve nothing.
    current = ranges({"n0": (2, 4), "n1": (0, 4)})
    for horizon_s in (inf, 3600.0):
        found = replan(spec, current=current, load_bytes_per_s=1e6, horizon_s=horizon_s, objective="max-flow")
        assert found.plan.placement == ranges({"n0": (0, 2), "n1": (2, 4)})
        assert found.plan.max_flow_tokens_per_s == pytest.approx(20)


def six_in_three_stages() -> tuple[ClusterSpec, dict[NodeId, LayerRange]]:
    spec = cluster(equal_nodes(7, 4), 12)
    return spec, ranges({f"n{i}": (4 * (i // 2), 4 * (i // 2) + 4) for i in range(6)})


def test_a_cluster_that_serves_well_is_left_alone() -> None:
    spec, current = six_in_three_stages()
    spec = lost(spec, NodeId("n6"))
    found = replan(spec, current=current, load_bytes_per_s=1e6, horizon_s=600, objective="max-flow")
    assert found.plan.placement == current
    assert (found.moves, found.load_bytes, found.load_s) == ((), 0.0, 0.0)
    assert found.plan.method == "as it is"


def test_what_nodes_hold_is_read_from_the_spec() -> None:
    spec, current = six_in_three_stages()
    held = replace(spec, nodes=tuple(replace(n, current_range=current.get(n.id)) for n in spec.nodes))
    found = replan(held, load_bytes_per_s=1e6, horizon_s=600, objective="max-flow")
    told = replan(spec, current=current, load_bytes_per_s=1e6, horizon_s=600, objective="max-flow")
    assert found.moves == told.moves
    assert {move.before for move in found.moves} != {None}


def test_a_spare_node_takes_the_place_of_a_lost_one_and_nobody_else_moves() -> None:
    spec, current = six_in_three_stages()
    found = replan(lost(spec, NodeId("n0")), current=current, load_bytes_per_s=1e6, survive=1, objective="max-flow")
    assert [(move.node, move.before, move.after) for move in found.moves] == [("n6", None, LayerRange(0, 4))]
    assert found.load_bytes == 4e6
    assert found.load_s == 4
    assert found.plan.max_flow_tokens_per_s == pytest.approx(600)


def test_the_horizon_decides_what_is_worth_moving() -> None:
    # Nothing is served before the two nodes left hold half each: two layers more for one, four for the other.
    spec = cluster(equal_nodes(3, 12), 12)
    current = ranges({"n0": (0, 4), "n1": (4, 8), "n2": (8, 12)})
    spec = lost(spec, NodeId("n2"))
    hurried = replan(spec, current=current, load_bytes_per_s=1e5, horizon_s=1, objective="max-flow")
    patient = replan(spec, current=current, load_bytes_per_s=1e5, horizon_s=1e6, objective="max-flow")
    free = replan(spec, current=current, load_bytes_per_s=1e5, horizon_s=inf, objective="max-flow")
    assert hurried.load_bytes <= patient.load_bytes
    assert patient.plan.max_flow_tokens_per_s == pytest.approx(free.plan.max_flow_tokens_per_s) == pytest.approx(200)
    assert patient.load_bytes == 6e6


def test_a_short_horizon_keeps_the_plan_and_a_long_one_improves_it() -> None:
    # Two stages of one fast and one slow node; a new fast node could replace a slow one.
    fast, slow = [400 / j for j in range(1, 5)], [40 / j for j in range(1, 5)]
    spec = cluster([node("f0", fast), node("s0", slow), node("f1", fast)], 8)
    current = ranges({"f0": (0, 4), "s0": (4, 8)})
    soon = replan(spec, current=current, load_bytes_per_s=1e4, horizon_s=100, objective="max-flow")
    later = replan(spec, current=current, load_bytes_per_s=1e4, horizon_s=1e5, objective="max-flow")
    assert soon.moves == ()
    assert soon.plan.max_flow_tokens_per_s == pytest.approx(10)
    assert later.plan.max_flow_tokens_per_s >= 100
    assert later.load_s > 0


def test_speeds_are_by_node_and_have_to_be_known() -> None:
    spec, current = six_in_three_stages()
    spec = lost(spec, NodeId("n0"))
    speeds = {n.id: 1e6 * (1 + i) for i, n in enumerate(spec.nodes)}
    found = replan(spec, current=current, load_bytes_per_s=speeds, survive=1, objective="max-flow")
    assert found.load_s == pytest.approx(4e6 / speeds[NodeId("n6")])
    with pytest.raises(ValueError, match="n1"):
        replan(spec, current=current, load_bytes_per_s={**speeds, NodeId("n1"): 0.0})
    with pytest.raises(ValueError, match="n6"):
        replan(spec, current=current, load_bytes_per_s={n: s for n, s in speeds.items() if n != "n6"})
    with pytest.raises(ValueError, match="latency"):
        replan(spec, current=current, load_bytes_per_s=1.0, objective="latency")


def test_pins_hold_and_the_same_seed_gives_the_same_replan() -> None:
    spec, current = six_in_three_stages()
    pinned = replace(
        spec, nodes=(replace(spec.nodes[0], fixed_range=LayerRange(2, 5)), replace(spec.nodes[1], exclude=True),
                     *spec.nodes[2:])
    )  # fmt: skip
    found = [
        replan(pinned, current=current, load_bytes_per_s=1e6, objective="max-flow", time_limit_s=1) for _ in range(2)
    ]
    assert found[0] == found[1]
    check(pinned, current, found[0])
    assert found[0].plan.placement[NodeId("n0")] == LayerRange(2, 5)
    assert "n1" not in found[0].plan.placement


def test_survive_1_is_kept_through_a_loss() -> None:
    spec, current = six_in_three_stages()
    found = replan(lost(spec, NodeId("n0")), current=current, load_bytes_per_s=1e6, survive=1, objective="max-flow")
    assert FlowModel(spec).survives(found.plan.placement)


def test_too_few_nodes_left_is_infeasible() -> None:
    spec, current = six_in_three_stages()
    for gone in ("n0", "n1", "n2", "n3", "n4"):
        spec = lost(spec, NodeId(gone))
    with pytest.raises(Infeasible):
        replan(spec, current=current, load_bytes_per_s=1e6)


def test_where_loading_has_a_price_nodes_that_are_needed_nowhere_else_stay() -> None:
    spec, current = six_in_three_stages()
    holding = Holding(spec)
    moved = CoverSearch(holding).run(600, sweeps=3, start=current, price=0.05, eager=False)
    assert {n: held for n, held in moved.items() if n in current} == current


@pytest.mark.parametrize(
    ("name", "gone"),
    [
        ("single24-llama70b", 0), ("single24-llama70b", 11), ("distributed24-llama70b", 8),
    ],
)  # fmt: skip
def test_a_lost_node_is_planned_around_as_well_as_from_scratch_with_less_to_load(name: str, gone: int) -> None:
    spec = parse_cluster(json.loads((shared_clusters() / f"{name}.json").read_text()))
    current = dict(plan_cluster(spec, objective="max-flow", time_limit_s=1).placement)
    left = lost(spec, spec.nodes[gone].id)
    scratch = plan_cluster(left, objective="max-flow", time_limit_s=1)
    free = replan(left, current=current, load_bytes_per_s=1e9, horizon_s=inf, objective="max-flow", time_limit_s=1)
    check(left, current, free)
    assert free.plan.max_flow_tokens_per_s >= 0.98 * scratch.max_flow_tokens_per_s
    hurried = replan(left, current=current, load_bytes_per_s=1e8, horizon_s=120, objective="max-flow", time_limit_s=1)
    check(left, current, hurried)
    assert hurried.load_bytes <= free.load_bytes
