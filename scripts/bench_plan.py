#!/usr/bin/env python3
"""Plan the published clusters and print one table: flow reached, bound, gap, seconds, against what is asked for.

    scripts/bench_plan.py [--time-limit S] [--clusters DIR] [NAME ...]

Every flow is computed again by the independent judge `evaluate_plan.py` beside the clusters; a row that it does not
confirm is an error. Exit status 1 if a row is wrong or falls short.
"""

import argparse
import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

from helixd.plan.clusterfile import parse_cluster
from helixd.plan.flow import FlowModel
from helixd.plan.plan import Plan
from helixd.plan.planner import plan_cluster
from helixd.plan.predict import stages
from helixd.plan.spec import ClusterSpec

HERE = Path(__file__).resolve().parent
CLUSTERS = HERE.parent.parent / "shared" / "clusters"

# Cluster, the max flow that has to be reached, the seconds it may take.
GOALS = (
    ("single24-llama70b", 2045.64, 1.0),
    ("heterogeneous42-llama70b", 5970.0, 5.0),
    ("distributed24-llama70b", 1754.0, 5.0),
    ("quality10-llama30b", 286.587, 1.0),
    ("single24-llama30b", 1353.0, 5.0),
    ("distributed24-llama30b", 1353.0, 5.0),
    ("sparse-single24-llama70b", 1600.0, 30.0),
    ("sparse-distributed24-llama70b", 1212.0, 30.0),
    ("sparse-heterogeneous42-llama70b", 4900.0, 30.0),
)


def judge_of(clusters: Path) -> Any:
    """The independent judge, loaded from beside the clusters; None if it is not there."""
    path = clusters.parent / "tools" / "evaluate_plan.py"
    spec = importlib.util.spec_from_file_location("evaluate_plan", path) if path.is_file() else None
    if spec is None or spec.loader is None:
        return None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def confirmed(judge: Any, raw: dict[str, Any], plan: Plan) -> bool:
    """Whether the judge finds the plan valid and the same flow."""
    placement = {str(node): held.to_pair() for node, held in plan.placement.items()}
    if judge.complaints(raw, placement):
        return False
    flow = float(judge.judge(raw, placement)["max_flow_tokens_per_s"])
    return abs(flow - plan.max_flow_tokens_per_s) <= 1e-4 + 1e-6 * flow


def depth(spec: ClusterSpec, plan: Plan) -> float:
    """Nodes that a token crosses, weighted by flow."""
    return stages(FlowModel(spec).solve(plan.placement))


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these clusters")
    parser.add_argument("--clusters", type=Path, default=CLUSTERS, help="folder of helixd-cluster/1 files")
    parser.add_argument("--time-limit", type=float, help="seconds per cluster instead of each row's own limit")
    options = parser.parse_args()
    if not options.clusters.is_dir():
        print(f"no clusters in {options.clusters}: name their folder with --clusters", file=sys.stderr)
        return 2
    judge = judge_of(options.clusters)
    if judge is None:
        print("evaluate_plan.py is not beside the clusters: flows are not checked independently", file=sys.stderr)
    sys.setrecursionlimit(100_000)
    print(f"{'cluster':34}{'asked':>9}{'flow':>10}{'bound':>10}{'gap %':>7}{'depth':>7}{'s':>7}{'within':>8}  checked")
    missed = 0
    for name, goal, within_s in GOALS:
        if options.names and name not in options.names:
            continue
        raw = json.loads((options.clusters / f"{name}.json").read_text())
        spec = parse_cluster(raw)
        limit_s = options.time_limit or within_s
        plan = plan_cluster(spec, objective="max-flow", time_limit_s=limit_s, clock=time.monotonic)
        assert plan.upper_bound_tokens_per_s is not None
        good = judge is None or confirmed(judge, raw, plan)
        reached = plan.max_flow_tokens_per_s >= goal * (1 - 1e-5)
        missed += not (good and reached)
        gap = 100 * (1 - plan.max_flow_tokens_per_s / plan.upper_bound_tokens_per_s)
        verdict = "not checked" if judge is None else "yes" if good else "WRONG"
        print(
            f"{name:34}{goal:9.1f}{plan.max_flow_tokens_per_s:10.2f}{plan.upper_bound_tokens_per_s:10.2f}{gap:7.2f}"
            f"{depth(spec, plan):7.1f}{plan.solve_s:7.2f}{within_s:8.0f}  {verdict}{'' if reached else ', SHORT'}",
            flush=True,
        )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
