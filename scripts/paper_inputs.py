"""What the paper's evaluation is run on: clusters, placements, traces, published figures; and a row of its table."""

import csv
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from helixd.ids import NodeId
from helixd.layers import LayerRange
from helixd.plan.cluster.clusterfile import parse_cluster
from helixd.plan.cluster.spec import ClusterSpec
from helixd.plan.graph.flow import FlowModel
from helixd.plan.holding import Holding
from helixd.plan.judge import judged
from helixd.plan.plan import Plan
from helixd.plan.planner import plan_cluster
from helixd.plan.predict import stages
from helixd.sim.load import Lengths
from helixd.sim.meter import Report
from helixd.solver.trial import Simulations

SHARED = Path(__file__).resolve().parents[2] / "shared"
SINGLE, DISTRIBUTED, MIXED = "single24-llama70b", "distributed24-llama70b", "heterogeneous42-llama70b"
CLUSTERS = (SINGLE, DISTRIBUTED, MIXED)


@dataclass(frozen=True, slots=True)
class Inputs:
    """What is read from disk, which clusters are asked for, and how many max flows are tried of each placement."""

    shared: Path
    lengths: Lengths
    per_interval: tuple[int, ...]
    seed: int
    clusters: tuple[str, ...] = CLUSTERS
    flows: int = 8

    def cluster(self, name: str) -> ClusterSpec:
        """The cluster of that name."""
        return parse_cluster(json.loads((self.shared / "clusters" / f"{name}.json").read_text()))

    def placed(self, spec: ClusterSpec, path: str) -> Plan:
        """The placement in a file, as a plan."""
        data = json.loads((self.shared / "clusters" / path).read_text())["placement"]
        placement = {NodeId(node): LayerRange(*pair) for node, pair in data.items() if pair and pair[0] < pair[1]}
        return judged(Holding(spec), placement, method=path, check=False)


def read_inputs(shared: Path, seed: int, clusters: tuple[str, ...] = CLUSTERS, flows: int = 8) -> Inputs:
    """The traces."""
    with (shared / "traces" / "azure_conv_lengths.csv").open() as file:
        pairs = [(int(row["input_tokens"]), int(row["output_tokens"])) for row in csv.DictReader(file)]
    with (shared / "traces" / "azure_conv_arrivals_per_3s.csv").open() as file:
        counts = tuple(int(row["requests"]) for row in csv.DictReader(file))
    return Inputs(shared, Lengths(pairs), counts, seed, clusters, flows)


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table; `figures` are its numbers, for the page in the docs."""

    cluster: str
    name: str
    published: str
    ours: str
    good: bool = True
    figures: Mapping[str, object] = field(default_factory=dict)


Section = Callable[[Inputs], Iterator[Row]]

_plans: dict[str, Plan] = {}


def our_plan(spec: ClusterSpec) -> Plan:
    """The planner's own choice, made once per cluster, with all the time it wants for simulating."""
    if spec.name not in _plans:
        trial = Simulations(spec, seed=0, out_of_time=lambda share: False)
        _plans[spec.name] = plan_cluster(spec, clock=time.monotonic, trial=trial.run)
    return _plans[spec.name]


def depth(spec: ClusterSpec, plan: Plan) -> float:
    """Nodes that a token crosses."""
    return stages(FlowModel(spec).solve(plan.placement))


def waits(report: Report) -> str:
    """Medians of the first token and of a decode pass."""
    return f"first token {report.ttft_s.p50:.2f} s, next {report.tpot_s.p50:.3f} s"


def served(report: Report) -> dict[str, object]:
    """A run's figures by name."""
    return {
        "decode_tokens_per_s": round(report.decode_tokens_per_s, 2),
        "ttft_p50_s": round(report.ttft_s.p50, 3),
        "tpot_p50_s": round(report.tpot_s.p50, 4),
        "in_flight": round(report.mean_in_flight, 1),
    }


def drawn(spec: ClusterSpec, plan: Plan) -> dict[str, object]:
    """A plan as far as a picture needs it."""
    through = FlowModel(spec).solve(plan.placement).through
    types = {node.id: node.profile.type for node in spec.nodes}
    return {
        "layers": plan.num_layers,
        "max_flow_tokens_per_s": round(plan.max_flow_tokens_per_s, 1),
        "nodes": [
            [node, types[node], held.start, held.end, round(through.get(node, 0.0), 1)]
            for node, held in sorted(plan.placement.items(), key=lambda item: (item[1].to_pair(), item[0]))
        ],
    }
