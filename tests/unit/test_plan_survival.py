from hypothesis import given, settings
from hypothesis import strategies as st

from helixd.layers import LayerRange
from helixd.plan.graph.flow import FlowModel
from helixd.plan.graph.survival import survives_one_loss
from tests.unit.plan_worlds import cluster, equal_nodes, ranges, without_links


def test_two_of_everything_survives_and_one_bridge_does_not() -> None:
    spec = cluster(equal_nodes(5, 4), 8)
    pairs = ranges({"n0": (0, 4), "n1": (0, 4), "n2": (4, 8), "n3": (4, 8)})
    assert survives_one_loss(FlowModel(spec), pairs)
    assert not survives_one_loss(FlowModel(spec), ranges({"n0": (0, 4), "n1": (0, 4), "n2": (4, 8)}))
    # Each layer twice, but only n0 has a link onwards.
    bridge = without_links(spec, [("n1", "n2"), ("n1", "n3")])
    assert not survives_one_loss(FlowModel(bridge), pairs)
    assert not survives_one_loss(FlowModel(spec), ranges({"n0": (0, 4)}))


@settings(max_examples=60, deadline=None)
@given(
    starts=st.lists(st.tuples(st.integers(0, 4), st.integers(1, 3)), min_size=1, max_size=5),
    gone=st.sets(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=8),
)
def test_equal_to_losing_each_node_in_turn(starts: list[tuple[int, int]], gone: set[tuple[int, int]]) -> None:
    nodes = equal_nodes(len(starts), 5)
    spec = without_links(cluster(nodes, 5), [(f"n{a}", f"n{b}") for a, b in gone])
    placement = {
        node.id: LayerRange(start, min(5, start + length))
        for node, (start, length) in zip(nodes, starts, strict=True)
    }  # fmt: skip
    flows = FlowModel(spec)
    each = all(flows.value({n: r for n, r in placement.items() if n != lost}) > 0 for lost in placement)
    assert survives_one_loss(flows, placement) == (each and flows.value(placement) > 0)
