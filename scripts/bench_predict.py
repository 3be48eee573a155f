#!/usr/bin/env python3
"""Does the planner's prediction rank placements as they simulate? Rank correlation over many placements per cluster.

    scripts/bench_predict.py [--shared DIR] [--count N] [--measure S] [--rows] [NAME ...]

Placements: what a search finds, what was published, what other rules place, and all of these with a few nodes moved.
Each is simulated offline under policy helixd. Exit status 1 below a correlation of 0.9.
"""

import argparse
import csv
import json
import sys
import time
from pathlib import Path
from random import Random

from helixd.ids import NodeId
from helixd.layers import LayerRange
from helixd.plan.baselines import baseline_plan
from helixd.plan.cluster.clusterfile import parse_cluster
from helixd.plan.graph.flow import FlowModel
from helixd.plan.holding import Holding
from helixd.plan.judge import judged
from helixd.plan.plan import Infeasible
from helixd.plan.predict import predict, stages
from helixd.plan.search.methods import Search
from helixd.sim.helixd import HelixdPolicy
from helixd.sim.load import Lengths, Offline

SHARED = Path(__file__).resolve().parents[2] / "shared"
CLUSTERS = ("single24-llama70b", "distributed24-llama70b", "heterogeneous42-llama70b")
ASKED = 0.9
# Over slow links it takes minutes until a cluster is full; before that it computes prompts above all.
WARMUP_S = 240.0
# Most that are taken of a search's own: many of them say the same thing.
_FROM_SEARCH = 24

Placement = dict[NodeId, LayerRange]


def placements(holding: Holding, shared: Path, count: int, seed: int) -> list[Placement]:
    """At least `count` different placements that carry flow, good and bad."""
    started = time.monotonic()
    search = Search(
        holding, seed=seed, effort_s=10.0, out_of_time=lambda: time.monotonic() - started > 10.0, widths=(1, 2),
        frontier=True,
    )  # fmt: skip
    searched = [dict(found.placement) for found in search.run()]
    found = searched[:: -(-len(searched) // _FROM_SEARCH)]
    for path in sorted((shared / "clusters").glob(f"*/{holding.spec.name}--*.json")):
        data = json.loads(path.read_text())["placement"]
        found.append({NodeId(node): LayerRange(*pair) for node, pair in data.items() if pair and pair[0] < pair[1]})
    for name in ("petals", "swarm", "separate"):
        try:
            found.append(dict(baseline_plan(name, holding.spec).placement))
        except Infeasible:
            continue
    flows = FlowModel(holding.spec)
    chance = Random(seed)
    origins, tries = list(found), 0
    while len(found) < count and tries < 100 * count:
        tries += 1
        moved = dict(chance.choice(origins))
        for node in chance.sample(sorted(moved), min(len(moved), chance.randint(1, 3))):
            held = moved[node]
            start = max(0, min(holding.num_layers - len(held), held.start + chance.randint(-4, 4)))
            moved[node] = LayerRange(start, start + len(held))
        if flows.value(moved) > 0:
            found.append(moved)
    return list({tuple(sorted(placement.items())): placement for placement in found}.values())


def ranks(values: list[float]) -> list[float]:
    """Ranks from 0, equal values sharing the mean of theirs."""
    order = sorted(range(len(values)), key=values.__getitem__)
    ranked = [0.0] * len(values)
    at = 0
    while at < len(order):
        end = at
        while end + 1 < len(order) and values[order[end + 1]] == values[order[at]]:
            end += 1
        for place in range(at, end + 1):
            ranked[order[place]] = (at + end) / 2
        at = end + 1
    return ranked


def correlation(a: list[float], b: list[float]) -> float:
    """Spearman's rank correlation."""
    ra, rb = ranks(a), ranks(b)
    mean = (len(a) - 1) / 2
    over = sum((x - mean) * (y - mean) for x, y in zip(ra, rb, strict=True))
    under = float(sum((x - mean) ** 2 for x in ra) * sum((y - mean) ** 2 for y in rb)) ** 0.5
    return over / under if under else 0.0


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", default=list(CLUSTERS), help="only these clusters")
    parser.add_argument("--shared", type=Path, default=SHARED, help="folder with clusters/ and traces/")
    parser.add_argument("--count", type=int, default=40, help="placements per cluster (default 40)")
    parser.add_argument("--measure", type=float, default=240.0, help="simulated seconds, after 240 (default 240)")
    parser.add_argument("--rows", action="store_true", help="print every placement")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if not (options.shared / "clusters").is_dir():
        print(f"no clusters in {options.shared}: name their folder with --shared", file=sys.stderr)
        return 2
    with (options.shared / "traces" / "azure_conv_lengths.csv").open() as file:
        lengths = Lengths([(int(row["input_tokens"]), int(row["output_tokens"])) for row in csv.DictReader(file)])
    missed = 0
    for name in options.names:
        spec = parse_cluster(json.loads((options.shared / "clusters" / f"{name}.json").read_text()))
        holding = Holding(spec)
        predicted: list[float] = []
        simulated: list[float] = []
        flows: list[float] = []
        for placement in placements(holding, options.shared, options.count, options.seed):
            flow = FlowModel(spec).solve(placement)
            prediction = predict(holding, placement, flow)
            if prediction is None:
                continue
            plan = judged(holding, placement, method="", flow=flow, prediction=prediction, check=False)
            load = Offline(warmup_s=WARMUP_S, measure_s=options.measure)
            report = HelixdPolicy().run(spec, plan, load, lengths, seed=options.seed)
            predicted.append(prediction.decode_tokens_per_s)
            simulated.append(report.decode_tokens_per_s)
            flows.append(flow.value)
            if options.rows:
                flight = f"{prediction.in_flight:6.0f} / {report.mean_in_flight:6.0f}"
                print(
                    f"  {flow.value:8.1f} flow {stages(flow):5.1f} stages {predicted[-1]:8.1f} predicted "
                    f"{simulated[-1]:8.1f} simulated; in flight {flight}; round {prediction.round_s:.3f} / "
                    f"{report.tpot_s.mean:.3f} s",
                    flush=True,
                )
        found = correlation(predicted, simulated)
        missed += found < ASKED
        ratio = sorted(p / s for p, s in zip(predicted, simulated, strict=True) if s > 0)
        print(
            f"{name:28}{len(predicted):4} placements: rank correlation {found:.3f} (max flow alone "
            f"{correlation(flows, simulated):.3f}); predicted / simulated {ratio[0]:.2f} to {ratio[-1]:.2f}, "
            f"median {ratio[len(ratio) // 2]:.2f}{'' if found >= ASKED else '  SHORT'}",
            flush=True,
        )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
