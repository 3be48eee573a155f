from dataclasses import replace

import pytest

from helixd.ids import NodeId
from helixd.plan.flow import FlowModel
from helixd.plan.holding import Holding
from helixd.plan.predict import Prediction, predict, stages
from helixd.plan.spec import ClusterSpec, NodeSpec
from tests.unit.plan_worlds import cluster, full_mesh, node, ranges

SPLIT = {"n0": (0, 2), "n1": (2, 4)}


def timed(name: str, *, decode_s: float = 0.002, kv: float = 40_000.0) -> NodeSpec:
    plain = node(name, [8000.0, 4000.0, 2500.0, 2000.0], kv=[kv] * 4)
    points = ((1.0, 0.001), (512.0, 0.05))
    profile = replace(
        plain.profile, prompt_layer_time_s=points, decode_layer_time_s=((1.0, decode_s), (64.0, 4 * decode_s))
    )
    return replace(plain, profile=profile)


def predicted(spec: ClusterSpec, placement: dict[str, tuple[int, int]]) -> Prediction:
    found = predict(Holding(spec), ranges(placement), FlowModel(spec).solve(ranges(placement)))
    assert found is not None
    return found


def test_never_more_than_the_flows_share_of_decode_tokens() -> None:
    spec = cluster([timed("n0", kv=1e9), timed("n1", kv=1e9)], 4)
    flow = FlowModel(spec).value(ranges(SPLIT))
    assert 0 < predicted(spec, SPLIT).decode_tokens_per_s <= flow * 240 / 990 * (1 + 1e-9)


def test_kv_room_latency_and_slow_decode_cost_throughput() -> None:
    nodes = [timed("n0"), timed("n1")]
    base = predicted(cluster(nodes, 4), SPLIT).decode_tokens_per_s
    scarce = predicted(cluster([timed("n0", kv=9_000), timed("n1", kv=9_000)], 4), SPLIT).decode_tokens_per_s
    far = predicted(cluster(nodes, 4, full_mesh(nodes, latency_s=0.5)), SPLIT).decode_tokens_per_s
    slow = predicted(cluster([timed("n0", decode_s=0.02), timed("n1")], 4), SPLIT).decode_tokens_per_s
    assert base > max(scarce, far, slow)


def test_a_round_takes_longer_under_load() -> None:
    found = predicted(cluster([timed("n0"), timed("n1")], 4), SPLIT)
    assert found.round_s >= found.unloaded_round_s > 0
    assert found.in_flight >= 1


def test_unknown_layer_times_give_no_prediction() -> None:
    spec = cluster([node("n0", [10.0] * 4)], 4)
    placement = ranges({"n0": (0, 4)})
    assert predict(Holding(spec), placement, FlowModel(spec).solve(placement)) is None


def test_stages_are_weighted_by_flow() -> None:
    spec = cluster([timed("n0"), timed("n1"), timed("n2")], 4)
    # Half goes through one node, half through two.
    placement = ranges({"n0": (0, 4), "n1": (0, 2), "n2": (2, 4)})
    flow = FlowModel(spec).solve(placement)
    assert flow.through[NodeId("n0")] == pytest.approx(2000)
    assert stages(flow) == pytest.approx((2000 + 4000 + 4000) / 6000)
