"""The paper's simulator, reproduced: short runs against what was published. The whole table: scripts/bench_paper.py."""

import csv
import json
from pathlib import Path

import pytest

from helixd.ids import NodeId
from helixd.layers import LayerRange
from helixd.plan.cluster.clusterfile import parse_cluster
from helixd.plan.graph.flow import FlowModel
from helixd.plan.graph.schedule import schedule_of
from helixd.plan.plan import Plan
from helixd.sim.helixd import HelixdPolicy
from helixd.sim.load import Lengths, Offline
from helixd.sim.paper import PaperPolicy
from tests.unit.plan_worlds import shared_clusters


def published(shared: Path, path: str, scheduler: str, in_flight: int | None, policy: str = "paper") -> float:
    placed = json.loads((shared / path).read_text())
    spec = parse_cluster(json.loads((shared / f"{placed['cluster']}.json").read_text()))
    placement = {NodeId(node): LayerRange(*pair) for node, pair in placed["placement"].items()}
    flow = FlowModel(spec).solve(placement)
    plan = Plan(spec.model.num_layers, placement, schedule_of(flow), flow.value)
    with (shared.parent / "traces" / "azure_conv_lengths.csv").open() as file:
        lengths = Lengths([(int(row["input_tokens"]), int(row["output_tokens"])) for row in csv.DictReader(file)])
    load = Offline(in_flight, warmup_s=60.0, measure_s=120.0)
    if policy == "helixd":
        return HelixdPolicy().run(spec, plan, load, lengths).decode_tokens_per_s
    return PaperPolicy(scheduler).run(spec, plan, load, lengths).decode_tokens_per_s


def test_the_swarm_baseline_serves_what_was_published() -> None:
    found = published(shared_clusters(), "published/single24-llama70b--swarm.json", "swarm", 180)
    assert found == pytest.approx(124.7, rel=0.08)


def test_decode_first_in_chunks_serves_far_more_than_the_papers_rules() -> None:
    shared, path = shared_clusters(), "published/single24-llama70b--helix.json"
    assert published(shared, path, "max-flow", None, "helixd") > 1.2 * published(shared, path, "max-flow", None)
