import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helixd.ids import NodeId
from helixd.layers import LayerRange
from helixd.plan.cluster.clusterfile import parse_cluster
from helixd.plan.cluster.spec import COORDINATOR, ClusterSpec, LinkSpec
from helixd.plan.graph.flow import FlowModel, node_capacity
from helixd.plan.graph.schedule import schedule_of
from tests.unit.plan_worlds import cluster, equal_nodes, node, ranges, shared_clusters, without_links


@st.composite
def placed_clusters(draw: st.DrawFn) -> tuple[ClusterSpec, dict[NodeId, LayerRange]]:
    num_layers = draw(st.integers(1, 5))
    count = draw(st.integers(1, 5))
    rate = st.floats(0.5, 1000)
    nodes = [node(f"n{i}", draw(st.lists(rate, min_size=num_layers, max_size=num_layers))) for i in range(count)]
    ends = [*(n.id for n in nodes), COORDINATOR]
    links = tuple(
        LinkSpec(a, b, draw(st.sampled_from([0.0, 3e3, 5e4, 1e6, 1e9])), 0.001)
        for a in ends
        for b in ends
        if a != b and draw(st.integers(0, 3))
    )
    placement = {}
    for n in nodes:
        start = draw(st.integers(0, num_layers - 1))
        placement[n.id] = LayerRange(start, draw(st.integers(start + 1, num_layers)))
    return cluster(nodes, num_layers, links), placement


def least_cut(spec: ClusterSpec, placement: dict[NodeId, LayerRange]) -> float:
    """Minimum over all ways to put node-in and node-out on a side: max flow by duality, with no flow algorithm."""
    edges = FlowModel(spec).edges(placement)
    capacity = {n: node_capacity(spec, spec.node(n), len(held)) for n, held in placement.items()}
    best = float("inf")
    for sides in itertools.product((0, 1, 2), repeat=len(placement)):  # both with source, in only, neither
        side = dict(zip(placement, sides, strict=True))
        cut = sum(capacity[n] for n, s in side.items() if s == 1)
        for (src, dst), room in edges.items():
            src_near = src == COORDINATOR or side[src] == 0
            dst_near = dst != COORDINATOR and side[dst] != 2
            cut += room if src_near and not dst_near else 0.0
        best = min(best, cut)
    return best


@settings(max_examples=120, deadline=None)
@given(placed_clusters(), st.booleans())
def test_max_flow_is_conserved_within_capacities_and_equals_the_minimum_cut(
    world: tuple[ClusterSpec, dict[NodeId, LayerRange]], spread: bool
) -> None:
    spec, placement = world
    model = FlowModel(spec)
    flow = model.solve(placement, spread=spread)
    assert flow.value == pytest.approx(least_cut(spec, placement), rel=1e-6, abs=1e-6)
    assert flow.value == pytest.approx(model.value(placement), rel=1e-9, abs=1e-9)
    room = model.edges(placement)
    for edge, carried in flow.edges.items():
        assert 0 < carried <= room[edge] * (1 + 1e-9)
    for name, held in placement.items():
        inward = sum(f for (_, dst), f in flow.edges.items() if dst == name)
        outward = sum(f for (src, _), f in flow.edges.items() if src == name)
        assert inward == pytest.approx(outward, rel=1e-6, abs=1e-6)
        assert inward == pytest.approx(flow.through.get(name, 0.0), rel=1e-6, abs=1e-6)
        assert inward <= node_capacity(spec, spec.node(name), len(held)) * (1 + 1e-9) + 1e-6
    assert sum(f for (src, _), f in flow.edges.items() if src == COORDINATOR) == pytest.approx(flow.value, abs=1e-6)
    assert sum(f for (_, dst), f in flow.edges.items() if dst == COORDINATOR) == pytest.approx(flow.value, abs=1e-6)
    cut = sum(node_capacity(spec, spec.node(n), len(placement[n])) for n in flow.tight_nodes)
    cut += sum(room[edge] for edge in flow.tight_edges)
    assert cut == pytest.approx(flow.value, rel=1e-6, abs=1e-6)


def test_partial_inference_lets_a_sequence_enter_in_the_middle_of_a_range() -> None:
    spec = cluster(equal_nodes(3, 4), 4)
    flow = FlowModel(spec).solve(ranges({"n0": (0, 2), "n1": (1, 4), "n2": (0, 1)}))
    # n0 enters n1 at 2, n2 at 1; n1's 400 is what both share.
    assert flow.value == pytest.approx(400)
    assert {edge for edge in flow.edges if edge[1] == "n1"} == {("n0", "n1"), ("n2", "n1")}


@pytest.mark.parametrize(("start", "end", "usable"), [(2, 3, True), (1, 3, True), (3, 4, False), (0, 2, False)])
def test_an_edge_is_usable_iff_the_entry_lies_in_the_next_range(start: int, end: int, usable: bool) -> None:
    spec = cluster(equal_nodes(2, 4), 4)
    edges = FlowModel(spec).edges(ranges({"n0": (0, 2), "n1": (start, end)}))
    assert (("n0", "n1") in edges) is usable


def test_equal_replicas_share_the_load_and_every_link_between_stages_is_used() -> None:
    spec = cluster(equal_nodes(6, 4), 12)
    flow = FlowModel(spec).solve(
        ranges({"n0": (0, 4), "n1": (0, 4), "n2": (4, 8), "n3": (4, 8), "n4": (8, 12), "n5": (8, 12)})
    )
    assert flow.value == pytest.approx(600)
    assert list(flow.through.values()) == pytest.approx([300] * 6)
    assert len(flow.edges) == 2 + 4 + 4 + 2


def test_a_surplus_is_spread_and_not_left_to_one_node() -> None:
    spec = cluster([*equal_nodes(3, 2), node("slow", [10, 10])], 4)
    flow = FlowModel(spec).solve(ranges({"n0": (0, 2), "n1": (0, 2), "n2": (0, 2), "slow": (2, 4)}))
    assert flow.value == pytest.approx(10)
    assert min(flow.through[NodeId(n)] for n in ("n0", "n1", "n2")) > 2
    assert flow.tight_nodes == {"slow"}


def test_nics_and_the_coordinators_links_bind() -> None:
    nodes = equal_nodes(2, 2)
    full = cluster(nodes, 2)
    placement = ranges({"n0": (0, 1), "n1": (1, 2)})
    assert FlowModel(full).value(placement) == pytest.approx(1200)
    nic = replace(full, nodes=(replace(nodes[0], nic_out_bytes_per_s=5000.0), nodes[1]))
    assert FlowModel(nic).value(placement) == pytest.approx(5)
    assert FlowModel(replace(full, coordinator_nic_out_bytes_per_s=40.0)).value(placement) == pytest.approx(10)
    assert FlowModel(replace(full, coordinator_nic_in_bytes_per_s=80.0)).value(placement) == pytest.approx(20)
    assert FlowModel(without_links(full, [("n0", "n1")])).value(placement) == 0.0


def test_schedule_lists_hops_heaviest_first_and_sums_to_the_flow() -> None:
    spec = cluster([*equal_nodes(2, 4), node("big", [3000.0] * 4)], 4)
    flow = FlowModel(spec).solve(ranges({"n0": (0, 4), "n1": (0, 4), "big": (0, 4)}))
    schedule = schedule_of(flow)
    assert [hop.node for hop in schedule[COORDINATOR]] == ["big", "n0", "n1"]
    assert sum(hop.flow_tokens_per_s for hop in schedule[COORDINATOR]) == pytest.approx(flow.value)
    assert [hop.node for hop in schedule[NodeId("big")]] == [COORDINATOR]


@settings(max_examples=60, deadline=None)
@given(placed_clusters())
def test_a_plan_survives_iff_something_flows_whichever_node_is_gone(
    world: tuple[ClusterSpec, dict[NodeId, LayerRange]],
) -> None:
    spec, placement = world
    model = FlowModel(spec)
    left = [model.value({n: held for n, held in placement.items() if n != lost}) for lost in placement]
    assert model.survives(placement) is (min(left) > 0)


def published() -> list[Path]:
    folder = Path(__file__).resolve().parents[3] / "shared" / "clusters"
    return sorted([*folder.glob("published/*.json"), *folder.glob("measured/*.json")])


@pytest.mark.parametrize("path", published() or [None], ids=lambda path: path.stem if path else "absent")
def test_published_max_flows_are_reproduced(path: Path | None) -> None:
    folder = shared_clusters()
    assert path is not None
    plan = json.loads(path.read_text())
    spec = parse_cluster(json.loads((folder / f"{plan['cluster']}.json").read_text()))
    placement = {NodeId(n): LayerRange(*pair) for n, pair in plan["placement"].items() if pair[1] > pair[0]}
    # One published value counts token and activation bytes together on its binding slow link: 1.2e-4 lower.
    assert FlowModel(spec).value(placement) == pytest.approx(plan["max_flow_tokens_per_s"], rel=1.3e-4)
