"""What a placement is worth on a cluster that changed, and whether a new plan is worth more."""

from dataclasses import replace

import pytest

from helixd.ids import NodeId
from helixd.layers import LayerRange
from helixd.plan.adopt import gain
from helixd.plan.holding import Holding
from helixd.plan.judge import current_plan, in_force, judged
from helixd.plan.plan import Infeasible, Plan
from tests.unit.plan_worlds import cluster, equal_nodes, ranges, without_links


def plan(flow: float, decode: float | None) -> Plan:
    return Plan(1, {}, {}, flow, predicted_decode_tokens_per_s=decode)


@pytest.mark.parametrize(
    ("kept", "planned", "share", "said"),
    [
        (plan(100, 10), plan(100, 12), 0.2, "20% more output"),
        # More flow that serves less is no gain.
        (plan(100, 10), plan(200, 9), -0.1, "-10% more output"),
        (plan(100, None), plan(150, None), 0.5, "50% more flow"),
        (plan(100, 10), plan(150, None), 0.5, "50% more flow"),
    ],
)
def test_output_decides_where_it_is_known(kept: Plan, planned: Plan, share: float, said: str) -> None:
    found = gain(kept, planned)
    assert found.share == pytest.approx(share)
    assert str(found) == said


PLACEMENT = ranges({"n0": (0, 4), "n1": (4, 8), "n2": (4, 8)})


def test_a_lost_node_takes_its_share_and_a_lost_stage_everything() -> None:
    whole = in_force(Holding(cluster(equal_nodes(3, 4), 8)), PLACEMENT)
    assert whole is not None
    assert whole.max_flow_tokens_per_s == pytest.approx(300)
    wide = {**PLACEMENT, NodeId("n9"): LayerRange(0, 4)}
    assert in_force(Holding(cluster(equal_nodes(3, 4), 8)), wide) == whole
    assert in_force(Holding(cluster(equal_nodes(3, 4)[1:], 8)), PLACEMENT) is None
    spec = cluster(equal_nodes(3, 4), 8)
    assert in_force(Holding(without_links(spec, [("n0", "n1"), ("n0", "n2")])), PLACEMENT) is None


def test_limits_that_came_later_are_not_held_against_what_is_there() -> None:
    spec = cluster(equal_nodes(3, 4), 8)
    narrow = replace(spec, nodes=tuple(replace(node, max_layers=2) for node in spec.nodes))
    assert in_force(Holding(narrow), PLACEMENT) is not None
    with pytest.raises(Infeasible, match="n0 may not hold"):
        judged(Holding(narrow), PLACEMENT, method="")
    held = replace(narrow, nodes=tuple(replace(n, current_range=PLACEMENT[n.id]) for n in narrow.nodes))
    assert current_plan(Holding(held)) is None


def test_a_node_that_shrank_below_what_it_holds_does_not_serve() -> None:
    nodes = equal_nodes(3, 4)
    small = replace(nodes[0], profile=replace(nodes[0].profile, throughput_tokens_per_s=(100.0,), max_layers=1))
    assert in_force(Holding(cluster([small, *nodes[1:]], 8)), PLACEMENT) is None
