"""Other rules for placing layers: what they place, and that they are judged like any plan."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from helixd.ids import NodeId
from helixd.layers import LayerRange
from helixd.plan.baselines import BASELINES, baseline_plan
from helixd.plan.baselines.layout import even_cuts
from helixd.plan.cluster.clusterfile import parse_cluster
from helixd.plan.cluster.spec import ClusterSpec, NodeSpec
from helixd.plan.graph.flow import FlowModel
from helixd.plan.holding import Holding
from helixd.plan.plan import Infeasible
from helixd.plan.search.exhaustive import best_of_all
from tests.unit.plan_worlds import cluster, equal_nodes, full_mesh, node, shared_clusters

PUBLISHED = [
    # The rules leave ties and, for Petals, the order of joining open: near, and some exactly.
    ("swarm", "single24-llama70b", 0.001),
    ("swarm", "distributed24-llama70b", 0.001),
    ("swarm", "heterogeneous42-llama70b", 0.001),
    ("petals", "single24-llama70b", 0.1),
    ("petals", "distributed24-llama70b", 0.1),
    ("petals", "single24-llama30b", 0.15),
    ("petals", "heterogeneous42-llama70b", 0.1),
]


@pytest.mark.parametrize(("rule", "name", "tolerance"), PUBLISHED)
def test_flows_of_the_published_placements_of_the_same_rule(rule: str, name: str, tolerance: float) -> None:
    folder = shared_folder()
    spec = parse_cluster(json.loads((folder / f"{name}.json").read_text()))
    published = json.loads((folder / "published" / f"{name}--{rule}.json").read_text())
    found = baseline_plan(rule, spec)
    assert found.max_flow_tokens_per_s == pytest.approx(published["max_flow_tokens_per_s"], rel=tolerance)


def shared_folder() -> Path:

    return shared_clusters()


def two_types() -> ClusterSpec:
    """Two of the one type hold the model, as do two of the other; a fifth node is left over."""
    fast = [typed(f"f{i}", "fast", [4000.0, 2000.0]) for i in range(2)]
    slow = [typed(f"s{i}", "slow", [400.0, 200.0]) for i in range(3)]
    return cluster([*fast, *slow], num_layers=4)


def typed(name: str, kind: str, throughput: list[float]) -> NodeSpec:
    plain = node(name, throughput)
    return replace(plain, profile=replace(plain.profile, type=kind))


@pytest.mark.parametrize("rule", BASELINES)
def test_every_rule_gives_a_valid_plan_whose_flow_is_its_own(rule: str) -> None:
    spec = two_types()
    found = baseline_plan(rule, spec, time_limit_s=20)
    holding = Holding(spec)
    assert all(holding.allows(name, held) for name, held in found.placement.items())
    # The pipelines of a rule may use fewer links than there are, never more.
    assert 0 < found.max_flow_tokens_per_s <= FlowModel(spec).value(found.placement) * (1 + 1e-9)
    assert found.method == rule


def test_separate_pipelines_do_not_mix_types() -> None:
    found = baseline_plan("separate", two_types())
    assert found.max_flow_tokens_per_s == pytest.approx(2000 + 200)
    assert set(found.placement) == {"f0", "f1", "s0", "s1"}
    hops = {(src[0], hop.node[0]) for src, hops in found.schedule.items() if src in found.placement for hop in hops}
    assert hops == {("f", "f"), ("f", "c"), ("s", "s"), ("s", "c")}


def test_an_even_split_runs_at_the_pace_of_its_slowest() -> None:
    found = baseline_plan("homogeneous", two_types())
    # Two pipelines of two: both fast nodes in one, by their order; with one more stage fewer nodes are of use.
    assert len(found.placement) == 4
    assert {held.to_pair() for held in found.placement.values()} == {(0, 2), (2, 4)}
    assert found.max_flow_tokens_per_s == pytest.approx(2200)


def test_the_papers_program_finds_the_optimum_of_small_clusters() -> None:
    nodes = [node("a", [900.0, 500.0, 300.0]), node("b", [700.0, 380.0]), node("c", [400.0, 250.0, 100.0])]
    spec = cluster(nodes, num_layers=4, links=full_mesh(nodes, bandwidth=6e5))
    holding = Holding(spec)
    best = best_of_all(holding, FlowModel(spec))
    assert best is not None
    assert best[1]
    found = baseline_plan("milp", spec, time_limit_s=20)
    assert found.max_flow_tokens_per_s == pytest.approx(FlowModel(spec).value(best[0]), rel=1e-6)


def test_the_papers_program_keeps_pins() -> None:
    nodes = [replace(equal_nodes(1, 4)[0], fixed_range=LayerRange(1, 3)), *equal_nodes(3, 4)[1:]]
    found = baseline_plan("milp", cluster(nodes, num_layers=4), time_limit_s=20)
    assert found.placement[NodeId("n0")] == LayerRange(1, 3)


def test_a_rule_without_a_placement_says_why() -> None:
    three = cluster(equal_nodes(3, max_layers=2), num_layers=6)
    for rule, said in (("milp", "too many"), ("separate", "no type"), ("swarm", "do not fill"), ("petals", "layer")):
        with pytest.raises(Infeasible, match=said):
            baseline_plan(rule, cluster(equal_nodes(14 if rule == "milp" else 3, max_layers=2), num_layers=40))
    assert baseline_plan("swarm", three).max_flow_tokens_per_s == pytest.approx(600)


def test_petals_joins_in_the_order_of_the_seed() -> None:
    spec = two_types()
    assert baseline_plan("petals", spec, seed=3).placement == baseline_plan("petals", spec, seed=3).placement


@pytest.mark.parametrize(("layers", "stages", "lengths"), [(7, 3, [3, 2, 2]), (4, 4, [1] * 4), (5, 1, [5])])
def test_even_cuts(layers: int, stages: int, lengths: list[int]) -> None:
    cuts = even_cuts(layers, stages)
    assert [len(cut) for cut in cuts] == lengths
    assert cuts[0].start == 0
    assert cuts[-1].end == layers
    assert all(a.end == b.start for a, b in pairwise(cuts))
