#!/usr/bin/env python3
"""The paper's evaluation in simulated time, one table: what was published, or measured with its artifact | ours.

    scripts/bench_paper.py [--shared DIR] [--only SECTION ...] [--seed N]

Sections: fidelity (policy paper, placements as published), paper (policy paper, our plan), offline and online (policy
helixd, our plan), baselines (policy helixd, others' placements and others' routing). Takes some ten minutes on a core.
Clusters, placements and traces are read from DIR, `../shared` beside the project. Exit status 1 if something that is
asked for falls short. Nothing here is a measurement of hardware.
"""

import argparse
import csv
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from helixd.ids import NodeId
from helixd.layers import LayerRange
from helixd.plan.baselines import BASELINES, baseline_plan
from helixd.plan.clusterfile import parse_cluster
from helixd.plan.flow import FlowModel
from helixd.plan.holding import Holding
from helixd.plan.judge import judged
from helixd.plan.plan import Hop, Infeasible, Plan
from helixd.plan.planner import plan_cluster
from helixd.plan.predict import PAPER, predict, stages
from helixd.plan.search import Search
from helixd.plan.spec import ClusterSpec
from helixd.sim.helixd import HelixdPolicy
from helixd.sim.load import Lengths, Offline, Online
from helixd.sim.meter import Report
from helixd.sim.paper import PaperPolicy

SHARED = Path(__file__).resolve().parents[2] / "shared"
SINGLE, DISTRIBUTED, MIXED = "single24-llama70b", "distributed24-llama70b", "heterogeneous42-llama70b"

# Cluster, placement, scheduler, requests in flight (None: the max-flow feed), decode tokens/s published or measured.
FIDELITY = (
    (SINGLE, f"published/{SINGLE}--helix.json", "max-flow", None, 252.1),
    (SINGLE, f"published/{SINGLE}--swarm.json", "swarm", 180, 124.7),
    (DISTRIBUTED, f"published/{DISTRIBUTED}--helix.json", "max-flow", None, 98.0),
    (DISTRIBUTED, f"published/{DISTRIBUTED}--swarm.json", "swarm", 180, 51.9),
    (MIXED, f"published/{MIXED}--helix.json", "max-flow", None, 645.6),
    (MIXED, f"published/{MIXED}--swarm.json", "swarm", 500, 473.2),
    (SINGLE, f"measured/{SINGLE}--chain24.json", "max-flow", None, 223.6),
    (SINGLE, f"measured/{SINGLE}--stages13.json", "max-flow", None, 247.5),
    (SINGLE, f"measured/{SINGLE}--stages12.json", "max-flow", None, 236.2),
    (DISTRIBUTED, f"measured/{DISTRIBUTED}--stages20.json", "max-flow", None, 158.0),
    (MIXED, f"measured/{MIXED}--stages28.json", "max-flow", None, 505.4),
)
# Published Helix, offline decode tokens/s; floor and aim under policy helixd; factor under policy paper.
OFFLINE = (
    (SINGLE, 252.1, 360.0, 420.0, 1.0),
    (DISTRIBUTED, 98.0, 230.0, 290.0, 1.6),
    (MIXED, 645.6, 880.0, 1050.0, 1.09),
)
# Published Helix, online: offered tokens/s, median first token and decode pass in seconds.
ONLINE = ((SINGLE, 700.0, 2.64, 0.98), (DISTRIBUTED, 320.0, 5.79, 0.93), (MIXED, 2150.0, 2.09, 0.73))
# Plans that are simulated, briefly, to choose one for policy paper.
TRIED, TRIED_S = 8, 150.0


@dataclass(frozen=True, slots=True)
class Inputs:
    """What is read from disk."""

    shared: Path
    lengths: Lengths
    per_interval: tuple[int, ...]
    seed: int

    def cluster(self, name: str) -> ClusterSpec:
        """The cluster of that name."""
        return parse_cluster(json.loads((self.shared / "clusters" / f"{name}.json").read_text()))

    def placed(self, spec: ClusterSpec, path: str) -> Plan:
        """The placement in a file, as a plan."""
        data = json.loads((self.shared / "clusters" / path).read_text())["placement"]
        placement = {NodeId(node): LayerRange(*pair) for node, pair in data.items() if pair and pair[0] < pair[1]}
        return judged(Holding(spec), placement, method=path, check=False)


def read_inputs(shared: Path, seed: int) -> Inputs:
    """The traces."""
    with (shared / "traces" / "azure_conv_lengths.csv").open() as file:
        pairs = [(int(row["input_tokens"]), int(row["output_tokens"])) for row in csv.DictReader(file)]
    with (shared / "traces" / "azure_conv_arrivals_per_3s.csv").open() as file:
        counts = tuple(int(row["requests"]) for row in csv.DictReader(file))
    return Inputs(shared, Lengths(pairs), counts, seed)


Row = tuple[str, str, str, bool]


def fidelity(inputs: Inputs) -> Iterator[Row]:
    """Policy paper. Which of the many max flows the artifact takes is unknown: an even one / one path by path; the
    nearer counts.
    """
    for cluster, path, scheduler, in_flight, published in FIDELITY:
        spec = inputs.cluster(cluster)
        plan = inputs.placed(spec, path)
        found: list[float] = []
        for even in (True, False) if scheduler == "max-flow" else (True,):
            policy = PaperPolicy(scheduler, even_flow=even)
            report = policy.run(spec, plan, Offline(in_flight), inputs.lengths, seed=inputs.seed)
            found.append(report.decode_tokens_per_s)
        nearest = min(found, key=lambda value: abs(value - published))
        both = " / ".join(f"{value:.1f}" for value in found)
        good = abs(nearest / published - 1) <= 0.05
        yield Path(path).stem, f"{published:.1f}", f"{both} ({nearest / published - 1:+.1%})", good


def paper(inputs: Inputs) -> Iterator[Row]:
    """Policy paper, where only the plan is ours: of the plans predicted best, the one that simulates best."""
    for cluster, published, _, _, factor in OFFLINE:
        spec = inputs.cluster(cluster)
        plan = plan_for_paper(inputs, spec)
        both: list[float] = []
        for even in (True, False):
            report = PaperPolicy(even_flow=even).run(spec, plan, Offline(), inputs.lengths, seed=inputs.seed)
            both.append(report.decode_tokens_per_s / published)
        asked = f"asked {factor:.2f} x; {both[1]:.2f} x with a flow path by path"
        note = f"{both[0] * published:.1f} = {both[0]:.2f} x ({asked}), {depth(spec, plan):.0f} stages"
        yield f"{cluster}, our plan", f"{published:.1f}", note, both[0] >= factor


def plan_for_paper(inputs: Inputs, spec: ClusterSpec) -> Plan:
    """A plan for the paper's rules of serving."""
    holding = Holding(spec)
    started = time.monotonic()
    search = Search(
        holding, seed=inputs.seed, effort_s=10.0, out_of_time=lambda: time.monotonic() - started > 10.0, widths=(1, 2),
        frontier=True,
    )  # fmt: skip
    plans: list[tuple[float, Plan]] = []
    for found in search.run():
        prediction = predict(holding, found.placement, found.flow, PAPER)
        worth = prediction.decode_tokens_per_s if prediction else 0.0
        plans.append((worth, judged(holding, found.placement, method=found.method, flow=found.flow)))
    plans.sort(key=lambda each: -each[0])
    load = Offline(measure_s=TRIED_S)
    return max(
        (plan for _, plan in plans[:TRIED]),
        key=lambda plan: PaperPolicy().run(spec, plan, load, inputs.lengths, seed=inputs.seed).decode_tokens_per_s,
    )


def offline(inputs: Inputs) -> Iterator[Row]:
    """Policy helixd, our plan, our routing, as much work as fits."""
    for cluster, published, floor, aim, _ in OFFLINE:
        spec = inputs.cluster(cluster)
        plan = our_plan(spec)
        for feedback in (False, True):
            policy = HelixdPolicy(feedback=feedback)
            report = policy.run(spec, plan, Offline(), inputs.lengths, seed=inputs.seed)
            ours = report.decode_tokens_per_s
            note = f"{ours:.1f} = {ours / published:.2f} x (floor {floor:.0f}, aim {aim:.0f}), {waits(report)}"
            name = f"{cluster}, {depth(spec, plan):.0f} stages" + (", direct feedback" if feedback else "")
            yield name, f"{published:.1f}", note, ours >= floor


def online(inputs: Inputs) -> Iterator[Row]:
    """Policy helixd at the rates of the paper's latency figures: half the first token, 0.8 of the decode pass."""
    for cluster, rate, first_s, pass_s in ONLINE:
        spec = inputs.cluster(cluster)
        plan = our_plan(spec)
        load = Online(rate, inputs.per_interval)
        report = HelixdPolicy().run(spec, plan, load, inputs.lengths, seed=inputs.seed)
        good = report.ttft_s.p50 <= first_s / 2 and report.tpot_s.p50 <= 0.8 * pass_s and not report.dropped
        asked = f"asked {first_s / 2:.2f} s, {0.8 * pass_s:.3f} s; {report.dropped} dropped"
        published = f"{first_s:.2f} s, {pass_s:.2f} s"
        yield f"{cluster} at {rate:.0f} tokens/s", published, f"{waits(report)} ({asked})", good


def baselines(inputs: Inputs) -> Iterator[Row]:
    """Policy helixd: what planning and routing give on their own, against others' placements and others' routing."""
    for cluster, _, _, _, _ in OFFLINE:
        spec = inputs.cluster(cluster)
        plan = our_plan(spec)
        ours = HelixdPolicy().run(spec, plan, Offline(), inputs.lengths, seed=inputs.seed).decode_tokens_per_s
        yield f"{cluster}, helixd", "-", f"{ours:.1f}", True
        for name in BASELINES:
            try:
                other = baseline_plan(name, spec, time_limit_s=5.0, clock=time.monotonic)
            except Infeasible as error:
                yield f"  placed by {name}", "-", f"no plan: {error}"[:70], True
                continue
            yield row_against(f"  placed by {name}", HelixdPolicy(), other, spec, inputs, ours)
        for chooser in ("swarm", "random", "shortest-queue", "round-robin"):
            every = every_edge(spec, plan)
            yield row_against(f"  routed by {chooser}", HelixdPolicy(chooser=chooser), every, spec, inputs, ours)


def row_against(
    name: str, policy: HelixdPolicy, plan: Plan, spec: ClusterSpec, inputs: Inputs, ours: float
) -> Row:  # fmt: skip
    """A baseline's row: what it serves, and how much more ours does."""
    report = policy.run(spec, plan, Offline(), inputs.lengths, seed=inputs.seed)
    theirs = report.decode_tokens_per_s
    return name, "-", f"{theirs:.1f}: " + (f"ours {ours / theirs:.2f} x" if theirs else "nothing"), True


def every_edge(spec: ClusterSpec, plan: Plan) -> Plan:
    """The plan with every usable link in its schedules, for routing that knows no flow."""
    hops: dict[NodeId, list[Hop]] = {}
    for src, dst in FlowModel(spec).edges(plan.placement):
        hops.setdefault(src, []).append(Hop(dst, 1.0))
    return replace(plan, schedule={src: tuple(found) for src, found in hops.items()})


_plans: dict[str, Plan] = {}


def our_plan(spec: ClusterSpec) -> Plan:
    """The planner's own choice, made once per cluster."""
    if spec.name not in _plans:
        _plans[spec.name] = plan_cluster(spec, clock=time.monotonic)
    return _plans[spec.name]


def depth(spec: ClusterSpec, plan: Plan) -> float:
    """Nodes that a token crosses."""
    return stages(FlowModel(spec).solve(plan.placement))


def waits(report: Report) -> str:
    """Medians of the first token and of a decode pass."""
    return f"first token {report.ttft_s.p50:.2f} s, next {report.tpot_s.p50:.3f} s"


RUN: dict[str, Callable[[Inputs], Iterator[Row]]] = {
    "fidelity": fidelity, "paper": paper, "offline": offline, "online": online, "baselines": baselines,
}  # fmt: skip


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=SHARED, help="folder with clusters/ and traces/")
    parser.add_argument("--only", nargs="+", choices=RUN, default=list(RUN), metavar="SECTION", help="these only")
    parser.add_argument("--seed", type=int, default=0, help="other lengths, other arrivals")
    options = parser.parse_args()
    if not (options.shared / "clusters").is_dir():
        print(f"no clusters in {options.shared}: name their folder with --shared", file=sys.stderr)
        return 2
    inputs = read_inputs(options.shared, options.seed)
    missed = 0
    print(f"{'':52}{'published':>16}  ours")
    for section in options.only:
        print(f"\n{section}: {' '.join((RUN[section].__doc__ or '').split())}")
        for name, published, ours, good in RUN[section](inputs):
            missed += not good
            print(f"  {name:50}{published:>16}  {ours}{'' if good else '  SHORT'}", flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
