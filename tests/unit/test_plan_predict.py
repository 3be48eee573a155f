import csv
import json
import math
from dataclasses import replace

import pytest

from helixd.ids import NodeId
from helixd.layers import LayerRange
from helixd.plan.cluster.clusterfile import parse_cluster
from helixd.plan.cluster.spec import COORDINATOR, ClusterSpec, NodeSpec
from helixd.plan.graph.flow import FlowModel
from helixd.plan.graph.schedule import schedule_of
from helixd.plan.holding import Holding
from helixd.plan.plan import Plan
from helixd.plan.predict import HELIXD, PAPER, Prediction, Rules, predict, stages
from helixd.sim.helixd import HelixdPolicy
from helixd.sim.load import Lengths, Offline
from tests.unit.plan_worlds import cluster, full_mesh, node, ranges, shared_clusters

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


def test_never_more_than_links_and_nics_carry() -> None:
    nodes = [timed("n0", kv=1e9), timed("n1", kv=1e9)]
    free = predicted(cluster(nodes, 4), SPLIT).decode_tokens_per_s
    # Activations of 1000 bytes: 990 tokens for every 240 decoded.
    slow = cluster(nodes, 4, full_mesh(nodes, bandwidth=1e5))
    assert 0 < predicted(slow, SPLIT).decode_tokens_per_s <= 100 * 240 / 990 < free
    narrow = replace(cluster(nodes, 4), nodes=(nodes[0], replace(nodes[1], nic_in_bytes_per_s=1e5)))
    assert 0 < predicted(narrow, SPLIT).decode_tokens_per_s <= 100 * 240 / 990 * (1 + 1e-9)


def test_what_is_given_for_no_sequence_says_nothing_of_one() -> None:
    """Published tables start with "no sequence, no time"; half of a batch of two is not a batch of one."""
    plain = timed("n0", kv=1e9)
    with_zero = replace(
        plain, profile=replace(plain.profile, decode_layer_time_s=((0.0, 0.0), *plain.profile.decode_layer_time_s))
    )
    alone = {"n0": (0, 4)}
    assert predicted(cluster([with_zero], 4), alone) == predicted(cluster([plain], 4), alone)


def test_a_full_node_bounds_the_requests_in_flight() -> None:
    even = predicted(cluster([timed("n0"), timed("n1")], 4), SPLIT).in_flight
    # Two nodes side by side on layers 2 and 3, one of them with little room.
    wide = {"n0": (0, 2), "n1": (2, 4), "n2": (2, 4)}
    rich = predicted(cluster([timed("n0"), timed("n1"), timed("n2")], 4), wide).in_flight
    poor = predicted(cluster([timed("n0"), timed("n1"), timed("n2", kv=4_000)], 4), wide).in_flight
    assert rich == pytest.approx(even)
    assert poor < even


def test_under_the_papers_rules_more_chunks_of_less_let_decodes_overtake() -> None:
    spec = cluster([timed("n0"), timed("n1")], 4)
    placement = ranges(SPLIT)
    flow = FlowModel(spec).solve(placement)
    rates = []
    for chunk in (64.0, 256.0, math.inf):
        found = predict(Holding(spec), placement, flow, replace(PAPER, chunk_tokens=chunk))
        assert found is not None
        rates.append(found.decode_tokens_per_s)
    assert rates == sorted(rates, reverse=True)


# What the artifact's simulator gives under its own rules and its max-flow scheduler; only pairs that differ clearly.
PAPER_ORDER = {
    "single24-llama70b": ["measured/stages13", "measured/chain24", "published/swarm"],
    "distributed24-llama70b": ["measured/stages20", "published/helix", "published/petals", "published/swarm"],
}


def placed(cluster_name: str, plan: str) -> tuple[ClusterSpec, dict[NodeId, LayerRange]]:
    folder = shared_clusters()
    kind, method = plan.split("/")
    spec = parse_cluster(json.loads((folder / f"{cluster_name}.json").read_text()))
    return spec, ranges(json.loads((folder / kind / f"{cluster_name}--{method}.json").read_text())["placement"])


def published(cluster_name: str, plan: str, rules: Rules) -> float:
    spec, placement = placed(cluster_name, plan)
    found = predict(Holding(spec), placement, FlowModel(spec).solve(placement), rules)
    assert found is not None
    return found.decode_tokens_per_s


def test_published_placements_rank_as_they_simulate() -> None:
    """Short runs of the simulator; scripts/bench_predict.py has many more, and longer ones."""
    folder = shared_clusters()
    with (folder.parent / "traces" / "azure_conv_lengths.csv").open() as file:
        lengths = Lengths([(int(row["input_tokens"]), int(row["output_tokens"])) for row in csv.DictReader(file)])
    guessed: list[float] = []
    counted: list[float] = []
    for plan in ("published/swarm", "published/petals", "measured/stages13"):
        spec, placement = placed("single24-llama70b", plan)
        flow = FlowModel(spec).solve(placement)
        made = Plan(spec.model.num_layers, placement, schedule_of(flow), flow.value)
        load = Offline(warmup_s=70.0, measure_s=50.0)
        counted.append(HelixdPolicy().run(spec, made, load, lengths).decode_tokens_per_s)
        guessed.append(published("single24-llama70b", plan, HELIXD))
    assert counted == sorted(counted)
    assert guessed == sorted(guessed)
    # So soon a large plan is still filling up, and serves less than it will.
    assert guessed == pytest.approx(counted, rel=0.5)


@pytest.mark.parametrize("name", PAPER_ORDER)
def test_published_placements_rank_as_under_the_papers_rules(name: str) -> None:
    rates = [published(name, plan, PAPER) for plan in PAPER_ORDER[name]]
    assert rates == sorted(rates, reverse=True)


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


def test_an_edge_that_carries_almost_nothing_is_no_division_by_zero() -> None:
    spec = cluster([timed("n0"), timed("n1"), timed("n2")], 4)
    placement = ranges({"n0": (0, 2), "n1": (2, 4), "n2": (2, 4)})
    flow = FlowModel(spec).solve(placement)
    n0, n1, n2 = (NodeId(name) for name in ("n0", "n1", "n2"))
    little = flow.value * 1e-9
    edges = {
        (COORDINATOR, n0): flow.value, (n0, n1): flow.value - little, (n1, COORDINATOR): flow.value - little,
        (n0, n2): little, (n2, COORDINATOR): little,
    }  # fmt: skip
    through = {n0: flow.value, n1: flow.value - little, n2: little}
    found = predict(Holding(spec), placement, replace(flow, edges=edges, through=through))
    assert found is not None
    assert found.decode_tokens_per_s > 0


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
