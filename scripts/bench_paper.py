#!/usr/bin/env python3
"""The paper's evaluation in simulated time, one table: what was published, or measured with its artifact | ours.

    scripts/bench_paper.py [--only SECTION ...] [--cluster NAME ...] [--flows N] [--save FILE] [--shared DIR] [--seed N]

Sections: fidelity (policy paper, placements as published), paper (policy paper, our plan), offline and online (policy
helixd, our plan), baselines (policy helixd, others' placements and others' routing), choice (is the plan that the
planner takes the one that simulates best), explore (what the paper did not try). All of it takes 40 minutes on a
core; --only and --cluster run it in pieces, and --save FILE keeps what they found beside what the file has.
Clusters, placements and traces are read from DIR, `../shared` beside the project. Exit status 1 if something that is
asked for falls short. Nothing here is a measurement of hardware.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median

from paper_explore import choice, explore
from paper_inputs import (
    CLUSTERS,
    DISTRIBUTED,
    MIXED,
    SHARED,
    SINGLE,
    Inputs,
    Row,
    Section,
    depth,
    drawn,
    our_plan,
    read_inputs,
    served,
    waits,
)

from helixd.ids import NodeId
from helixd.plan.baselines import BASELINES, baseline_plan
from helixd.plan.cluster.spec import ClusterSpec
from helixd.plan.graph.flow import FlowModel
from helixd.plan.holding import Holding
from helixd.plan.judge import judged
from helixd.plan.plan import Hop, Infeasible, Plan
from helixd.plan.predict import PAPER, predict
from helixd.plan.search.methods import Search
from helixd.sim.helixd import HelixdPolicy
from helixd.sim.load import Offline, Online
from helixd.sim.paper import PaperPolicy
from helixd.sim.paper_schedule import scheduled_flow

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
SHORTLY = Offline(warmup_s=120.0, measure_s=240.0)


def fidelity(inputs: Inputs) -> Iterator[Row]:
    """Policy paper. Which of the many max flows the artifact took is unknown: an even one / one path by path / the
    median of preflow pushes with arcs in several orders (least to most); the nearest of all counts.
    """
    for cluster, path, scheduler, in_flight, published in FIDELITY:
        if cluster not in inputs.clusters:
            continue
        spec = inputs.cluster(cluster)
        plan = inputs.placed(spec, path)
        found = [
            policy.run(spec, plan, Offline(in_flight), inputs.lengths, seed=inputs.seed).decode_tokens_per_s
            for policy in _policies(spec, plan, scheduler, inputs.flows)
        ]
        nearest = min(found, key=lambda value: abs(value - published))
        shown = " / ".join(f"{value:.1f}" for value in found[:2])
        pushed = sorted(found[2:])
        if pushed:
            shown += f" / {median(pushed):.1f} ({pushed[0]:.1f} to {pushed[-1]:.1f}, {len(pushed)} flows)"
        extra: dict[str, object] = {"flows": len(found)}
        if path.endswith("helix.json"):
            extra["plan"] = drawn(spec, plan)
        figures = {
            name: round(value, 2)
            for name, value in (
                ("published", published), ("nearest", nearest), ("least", min(found)), ("median", median(found)),
                ("most", max(found)),
            )
        }  # fmt: skip
        shown += f"; {nearest / published - 1:+.1%}"
        good = abs(nearest / published - 1) <= 0.05
        yield Row(cluster, Path(path).stem, f"{published:.1f}", shown, good, {**figures, **extra})


def _policies(spec: ClusterSpec, plan: Plan, scheduler: str, flows: int) -> list[PaperPolicy]:
    """One for every different max flow that is tried."""
    if scheduler != "max-flow":
        return [PaperPolicy(scheduler)]
    found = [PaperPolicy(), PaperPolicy(flow="paths")]
    found += [PaperPolicy(flow="preflow", flow_seed=None if n == 0 else n) for n in range(flows)]
    known: dict[tuple[object, ...], PaperPolicy] = {}
    for policy in found:
        flow = scheduled_flow(spec, plan.placement, kind=policy.flow, seed=policy.flow_seed)
        known.setdefault(tuple(sorted((edge, round(carried, 3)) for edge, carried in flow.edges.items())), policy)
    return list(known.values())


def paper(inputs: Inputs) -> Iterator[Row]:
    """Policy paper, where only the plan is ours: of the plans predicted best, the one that simulates best."""
    for cluster, published, _, _, factor in OFFLINE:
        if cluster not in inputs.clusters:
            continue
        spec = inputs.cluster(cluster)
        plan = plan_for_paper(inputs, spec)
        both: list[float] = []
        for flow in ("even", "paths"):
            report = PaperPolicy(flow=flow).run(spec, plan, Offline(), inputs.lengths, seed=inputs.seed)
            both.append(report.decode_tokens_per_s / published)
        asked = f"asked {factor:.2f} x; {both[1]:.2f} x with a flow path by path"
        note = f"{both[0] * published:.1f} = {both[0]:.2f} x ({asked}), {depth(spec, plan):.0f} stages"
        figures = {"decode_tokens_per_s": round(both[0] * published, 2), "published": published}
        yield Row(cluster, f"{cluster}, our plan", f"{published:.1f}", note, both[0] >= factor, figures)


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
        if cluster not in inputs.clusters:
            continue
        spec = inputs.cluster(cluster)
        plan = our_plan(spec)
        for feedback in (False, True):
            policy = HelixdPolicy(feedback=feedback)
            report = policy.run(spec, plan, Offline(), inputs.lengths, seed=inputs.seed)
            ours = report.decode_tokens_per_s
            note = f"{ours:.1f} = {ours / published:.2f} x (floor {floor:.0f}, aim {aim:.0f}), {waits(report)}"
            name = f"{cluster}, {depth(spec, plan):.0f} stages" + (", direct feedback" if feedback else "")
            figures = {"published": published, **served(report)} | ({} if feedback else {"plan": drawn(spec, plan)})
            yield Row(cluster, name, f"{published:.1f}", note, ours >= floor, figures)


def online(inputs: Inputs) -> Iterator[Row]:
    """Policy helixd at the rates of the paper's latency figures: half the first token, 0.8 of the decode pass."""
    for cluster, rate, first_s, pass_s in ONLINE:
        if cluster not in inputs.clusters:
            continue
        spec = inputs.cluster(cluster)
        plan = our_plan(spec)
        load = Online(rate, inputs.per_interval)
        report = HelixdPolicy().run(spec, plan, load, inputs.lengths, seed=inputs.seed)
        good = report.ttft_s.p50 <= first_s / 2 and report.tpot_s.p50 <= 0.8 * pass_s and not report.dropped
        asked = f"asked {first_s / 2:.2f} s, {0.8 * pass_s:.3f} s; {report.dropped} dropped"
        published = f"{first_s:.2f} s, {pass_s:.2f} s"
        figures = {"published_ttft_p50_s": first_s, "published_tpot_p50_s": pass_s, "rate": rate, **served(report)}
        name = f"{cluster} at {rate:.0f} tokens/s"
        yield Row(cluster, name, published, f"{waits(report)} ({asked})", good, figures)


def baselines(inputs: Inputs) -> Iterator[Row]:
    """Policy helixd: what planning and routing give on their own, against others' placements and others' routing;
    240 s after 120 s.
    """
    for cluster in inputs.clusters:
        spec = inputs.cluster(cluster)
        plan = our_plan(spec)
        report = HelixdPolicy().run(spec, plan, SHORTLY, inputs.lengths, seed=inputs.seed)
        ours = report.decode_tokens_per_s
        yield Row(cluster, f"{cluster}, helixd", "-", f"{ours:.1f}", figures=served(report))
        for name in BASELINES:
            try:
                other = baseline_plan(name, spec, time_limit_s=5.0, clock=time.monotonic)
            except Infeasible as error:
                yield Row(cluster, f"  placed by {name}", "-", f"no plan: {error}", figures={"none": str(error)})
                continue
            yield row_against(f"  placed by {name}", HelixdPolicy(), other, spec, inputs, ours)
        for chooser in ("swarm", "random", "shortest-queue", "round-robin"):
            every = every_edge(spec, plan)
            yield row_against(f"  routed by {chooser}", HelixdPolicy(chooser=chooser), every, spec, inputs, ours)


def row_against(
    name: str, policy: HelixdPolicy, plan: Plan, spec: ClusterSpec, inputs: Inputs, ours: float
) -> Row:  # fmt: skip
    """A baseline's row: what it serves, and how much more ours does."""
    report = policy.run(spec, plan, SHORTLY, inputs.lengths, seed=inputs.seed)
    theirs = report.decode_tokens_per_s
    shown = f"{theirs:.1f}: " + (f"ours {ours / theirs:.2f} x" if theirs else "nothing")
    return Row(spec.name, name, "-", shown, figures=served(report))


def every_edge(spec: ClusterSpec, plan: Plan) -> Plan:
    """The plan with every usable link in its schedules, for routing that knows no flow."""
    hops: dict[NodeId, list[Hop]] = {}
    for src, dst in FlowModel(spec).edges(plan.placement):
        hops.setdefault(src, []).append(Hop(dst, 1.0))
    return replace(plan, schedule={src: tuple(found) for src, found in hops.items()})


RUN: dict[str, Section] = {
    "fidelity": fidelity, "paper": paper, "offline": offline, "online": online, "baselines": baselines,
    "choice": choice, "explore": explore,
}  # fmt: skip


def save(path: Path, section: str, cluster: str, rows: list[Row]) -> None:
    """Keep a section's rows of one cluster in a JSON file, a line each, beside what else it has."""
    data = json.loads(path.read_text()) if path.exists() else {}
    data.setdefault(section, {})[cluster] = [
        {"name": row.name.strip(), "good": row.good, "shown": row.ours, **row.figures} for row in rows
    ]
    path.write_text(lines_of(data))


def lines_of(data: Mapping[str, Mapping[str, list[object]]]) -> str:
    """The file's text."""
    sections: list[str] = []
    for section in [name for name in RUN if name in data]:
        clusters = [
            f"  {json.dumps(cluster)}: [\n" + ",\n".join(f"   {json.dumps(row)}" for row in rows) + "\n  ]"
            for cluster, rows in sorted(data[section].items(), key=lambda item: CLUSTERS.index(item[0]))
        ]
        sections.append(f" {json.dumps(section)}: {{\n" + ",\n".join(clusters) + "\n }")
    return "{\n" + ",\n".join(sections) + "\n}\n"


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=SHARED, help="folder with clusters/ and traces/")
    parser.add_argument("--only", nargs="+", choices=RUN, default=list(RUN), metavar="SECTION", help="these only")
    parser.add_argument("--cluster", nargs="+", choices=CLUSTERS, default=CLUSTERS, metavar="NAME", help="these only")
    parser.add_argument("--flows", type=int, default=8, metavar="N", help="preflow pushes tried in fidelity (8)")
    parser.add_argument("--save", type=Path, metavar="FILE", help="keep the figures in this JSON file")
    parser.add_argument("--seed", type=int, default=0, help="other lengths, other arrivals")
    options = parser.parse_args()
    if not (options.shared / "clusters").is_dir():
        print(f"no clusters in {options.shared}: name their folder with --shared", file=sys.stderr)
        return 2
    missed = 0
    print(f"{'':52}{'published':>16}  ours")
    for section in options.only:
        print(f"\n{section}: {' '.join((RUN[section].__doc__ or '').split())}")
        for cluster in options.cluster:
            rows: list[Row] = []
            for row in RUN[section](read_inputs(options.shared, options.seed, (cluster,), options.flows)):
                rows.append(row)
                missed += not row.good
                print(f"  {row.name:50}{row.published:>16}  {row.ours}{'' if row.good else '  SHORT'}", flush=True)
            if options.save:
                save(options.save, section, cluster, rows)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
