#!/usr/bin/env python3
"""Plan the published and made-up clusters and print one table: what is asked for, what is reached, in how much time.

    scripts/bench_plan.py [--clusters DIR] [--time-limit S] [WORD ...]

Only rows whose name contains one of the words, if any are given. Times are this process's CPU seconds, which is what a
quiet core would take; every flow is computed again by the independent judge `evaluate_plan.py` beside the clusters, and
a row that it does not confirm is an error. Exit status 1 if a row is wrong or falls short.
"""

import argparse
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any, TextIO

from synthetic_clusters import region_of, synthetic

from helixd.ids import NodeId
from helixd.layers import LayerRange
from helixd.plan.cluster.clusterfile import parse_cluster
from helixd.plan.cluster.spec import ClusterSpec
from helixd.plan.frontier import fewest_stages
from helixd.plan.graph.flow import FlowModel
from helixd.plan.holding import Holding
from helixd.plan.moves import total_bytes
from helixd.plan.plan import Plan
from helixd.plan.planner import plan_cluster
from helixd.plan.predict import stages
from helixd.plan.replan import Option, Replan, lost, replan

HERE = Path(__file__).resolve().parent
CLUSTERS = HERE.parent.parent / "shared" / "clusters"

# Cluster, the max flow that has to be reached, the seconds it may take, and the largest gap in % (None: none asked).
PUBLISHED = (
    ("single24-llama70b", 2045.64, 1.0, 0.001),
    ("heterogeneous42-llama70b", 5970.0, 5.0, 1.5),
    ("distributed24-llama70b", 1754.0, 5.0, 0.001),
    ("quality10-llama30b", 286.587, 1.0, 0.001),
    ("single24-llama30b", 1353.0, 5.0, None),
    ("distributed24-llama30b", 1353.0, 5.0, None),
    ("sparse-single24-llama70b", 1600.0, 30.0, None),
    ("sparse-distributed24-llama70b", 1212.0, 30.0, None),
    ("sparse-heterogeneous42-llama70b", 4900.0, 30.0, None),
)
# Nodes, nodes per region (None: one region), what share of the bound or of the regions' sum is asked, seconds.
SYNTHETIC = (
    (100, None, 0.97, 10.0), (300, None, 0.98, 10.0), (1000, None, 0.98, 10.0),
    (100, 25, 0.9, 10.0), (300, 25, 0.9, 10.0), (1000, 25, 0.9, 60.0),
)  # fmt: skip
# Cluster, flow, the most stages, seconds.
FRONTIER = (
    ("single24-llama70b", 1289.0, 12, 2.0), ("single24-llama70b", 1476.0, 13, 2.0),
    ("single24-llama70b", 1754.0, 20, 2.0), ("heterogeneous42-llama70b", 4892.0, 14, 2.0),
    ("heterogeneous42-llama70b", 5500.0, 18, 2.0),
)  # fmt: skip
# Clusters that lose each node in turn, seconds for one re-plan.
LOSSES = (
    ("single24-llama70b", 0.1), ("heterogeneous42-llama70b", 0.1), ("distributed24-llama70b", 4.0),
)  # fmt: skip
WITHIN_OF_SCRATCH = 0.98
LOAD_BYTES_PER_S = 1e9
HORIZON_S = 3600.0

Placement = Mapping[NodeId, LayerRange]


@dataclass(frozen=True)
class Row:
    """A line of the table. `flow`, `asked` and `bound` in tokens/s. `short`: how it falls short, if it does."""

    name: str
    asked: float
    flow: float
    bound: float | None
    depth: float | None
    cpu_s: float
    within_s: float
    right: bool | None
    note: str = ""
    short: str = ""


class Judge:
    """The independent judge, loaded from beside the clusters."""

    def __init__(self, clusters: Path) -> None:
        path = clusters.parent / "tools" / "evaluate_plan.py"
        spec = importlib.util.spec_from_file_location("evaluate_plan", path) if path.is_file() else None
        self._module: Any = None
        if spec is not None and spec.loader is not None:
            self._module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(self._module)

    def there(self) -> bool:
        """Whether anything is judged at all."""
        return self._module is not None

    def confirms(self, raw: dict[str, Any], placement: Placement, flow: float) -> bool | None:
        """Whether the placement is valid and has that flow; None if there is no judge."""
        if self._module is None:
            return None
        pairs = {str(node): held.to_pair() for node, held in placement.items()}
        if self._module.complaints(raw, pairs):
            return False
        judged = float(self._module.network(raw, pairs).max_flow("source", "sink"))
        return abs(flow - judged) <= 1e-4 + 1e-6 * judged


class Bench:
    """The rows, one after the other."""

    def __init__(self, clusters: Path, time_limit_s: float | None) -> None:
        self._clusters = clusters
        self._limit_s = time_limit_s
        self.judge = Judge(clusters)

    def raw(self, name: str) -> dict[str, Any]:
        """A published cluster as it is in its file."""
        found: dict[str, Any] = json.loads((self._clusters / f"{name}.json").read_text())
        return found

    def published(self, name: str, asked: float, within_s: float, gap: float | None) -> Row:
        """One published cluster, planned for max flow."""
        raw = self.raw(name)
        row = self._planned(name, raw, parse_cluster(raw), asked, within_s)
        assert row.bound is not None
        if gap is not None and 100 * (1 - row.flow / row.bound) > gap:
            return Row(**{**row.__dict__, "short": f"gap above {gap} %"})
        return row

    def made_up(self, count: int, region_size: int | None, share: float, within_s: float) -> Row:
        """A synthetic cluster against its bound, or against what its regions reach alone, each planned by itself."""
        raw = synthetic(self.raw("heterogeneous42-llama70b"), count, region_size=region_size)
        row = self._planned(raw["name"], raw, parse_cluster(raw), 0.0, within_s)
        assert row.bound is not None
        bound, note = row.bound, f"{100 * row.flow / row.bound:.1f} % of the bound"
        if region_size is not None:
            parts = [region_of(raw, region) for region in sorted({node["region"] for node in raw["nodes"]})]
            alone = [plan_cluster(parse_cluster(part), objective="max-flow", time_limit_s=2.0) for part in parts]
            bound = sum(plan.max_flow_tokens_per_s for plan in alone)
            limits = sum(plan.upper_bound_tokens_per_s or 0.0 for plan in alone)
            ratios = (100 * row.flow / bound, 100 * row.flow / limits)
            note = "{:.1f} % of the regions' sum, {:.1f} % of their bounds' sum".format(*ratios)
        asked = share * bound
        short = "" if row.flow >= asked else "SHORT"
        return Row(**{**row.__dict__, "asked": asked, "bound": bound, "note": note, "short": short})

    def shallow(self, name: str, flow: float, most: int, within_s: float) -> Row:
        """The fewest stages at a flow."""
        raw = self.raw(name)
        spec = parse_cluster(raw)
        started = time.process_time()
        found = fewest_stages(Holding(spec), flow)
        cpu_s = time.process_time() - started
        label = f"{name} at {flow:g}: stages"
        if found is None:
            return Row(label, most, 0.0, None, None, cpu_s, within_s, None, short="SHORT")
        reached = FlowModel(spec).value(found.placement)
        right = self.judge.confirms(raw, found.placement, reached)
        good = found.stages <= most and reached >= flow
        note = f"{found.stages} stages, {most} asked"
        return Row(label, flow, reached, None, found.stages, cpu_s, within_s, right, note, "" if good else "SHORT")

    def losing(self, name: str, within_s: float) -> Iterator[Row]:
        """Each node lost in turn: free to move everything, then as worth it."""
        raw = self.raw(name)
        spec = parse_cluster(raw)
        before = plan_cluster(spec, objective="max-flow", time_limit_s=5.0).placement
        scratch = {
            node.id: plan_cluster(lost(spec, node.id), objective="max-flow", time_limit_s=4.0) for node in spec.nodes
        }
        for horizon_s, what in ((inf, "keep 0"), (HORIZON_S, "default")):
            losses = [self._lose(raw, spec, before, scratch[node.id], node.id, horizon_s) for node in spec.nodes]
            yield _summary(f"{name} lose one, {what}", losses, within_s, free=horizon_s == inf)

    def _lose(
        self, raw: dict[str, Any], spec: ClusterSpec, before: Placement, scratch: Plan, gone: NodeId, horizon_s: float
    ) -> "Loss":
        left = lost(spec, gone)
        judged = {
            **raw,
            "nodes": [node for node in raw["nodes"] if node["id"] != gone],
            "links": [link for link in raw["links"] if gone not in link[:2]],
        }
        started = time.process_time()
        found = replan(
            left, current=before, load_bytes_per_s=LOAD_BYTES_PER_S, horizon_s=horizon_s, objective="max-flow",
            time_limit_s=4.0,
        )  # fmt: skip
        cpu_s = time.process_time() - started
        right = self.judge.confirms(judged, found.plan.placement, found.plan.max_flow_tokens_per_s)
        return Loss(
            gone, found, scratch.max_flow_tokens_per_s, total_bytes(left.model, before, scratch.placement), cpu_s, right
        )

    def _planned(self, name: str, raw: dict[str, Any], spec: ClusterSpec, asked: float, within_s: float) -> Row:
        plan = plan_cluster(spec, objective="max-flow", time_limit_s=self._limit_s or within_s, clock=time.process_time)
        flow = plan.max_flow_tokens_per_s
        right = self.judge.confirms(raw, plan.placement, flow)
        depth = stages(FlowModel(spec).solve(plan.placement, spread=False))
        short = "" if flow >= asked * (1 - 1e-5) else "SHORT"
        return Row(name, asked, flow, plan.upper_bound_tokens_per_s, depth, plan.solve_s, within_s, right, "", short)


@dataclass(frozen=True)
class Loss:
    """One node lost: the re-plan, and what planning from scratch reaches and would load."""

    gone: NodeId
    found: Replan
    scratch_flow: float
    scratch_bytes: float
    cpu_s: float
    right: bool | None

    def share(self) -> float:
        """The flow reached of that of a plan from scratch."""
        return self.found.plan.max_flow_tokens_per_s / self.scratch_flow


def _summary(name: str, losses: list[Loss], within_s: float, *, free: bool) -> Row:
    """The worst of all losses, and means of what is moved."""
    count = len(losses)
    worst = min(losses, key=Loss.share)
    moved = sum(loss.found.load_bytes for loss in losses) / count / 1e9
    scratch = sum(loss.scratch_bytes for loss in losses) / count / 1e9
    waits = sum(loss.found.load_s for loss in losses) / count
    note = (
        f"worst {100 * worst.share():.1f} % of scratch ({worst.gone}); mean {moved:.0f} GB moved "
        f"(scratch {scratch:.0f}), {waits:.0f} s until serving; "
        f"cpu s are the median's, worst {max(loss.cpu_s for loss in losses):.2f}"
    )
    if not free:
        note += f"; {worst.gone}: {_trade(worst.found.options)}"
    rights = {loss.right for loss in losses}
    right = None if None in rights else rights == {True}
    return Row(
        name,
        WITHIN_OF_SCRATCH * worst.scratch_flow if free else 0.0,
        worst.found.plan.max_flow_tokens_per_s,
        worst.scratch_flow,
        None,
        sorted(loss.cpu_s for loss in losses)[count // 2],
        within_s,
        right,
        note,
        "SHORT" if free and worst.share() < WITHIN_OF_SCRATCH else "",
    )


def _trade(options: tuple[Option, ...]) -> str:
    return ", ".join(
        f"{option.flow_tokens_per_s:.0f} for {option.load_bytes / 1e9:.0f} GB in {option.load_s:.0f} s"
        for option in options
    )


def _line(row: Row) -> str:
    bound = f"{row.bound:11.2f}{100 * (1 - row.flow / row.bound):7.2f}" if row.bound else f"{'':18}"
    depth = f"{row.depth:7.1f}" if row.depth is not None else f"{'':7}"
    verdict = "not checked" if row.right is None else "yes" if row.right else "WRONG"
    slow = "" if row.cpu_s <= row.within_s else "SLOW"
    words = ", ".join(word for word in (verdict, row.short, slow, row.note) if word)
    return f"{row.name:44}{row.asked:11.2f}{row.flow:11.2f}{bound}{depth}{row.cpu_s:7.2f}{row.within_s:7.1f}  {words}"


def _rows(bench: Bench) -> Iterator[tuple[str, Callable[[], Iterator[Row]]]]:
    for name, asked, within_s, gap in PUBLISHED:
        yield name, lambda args=(name, asked, within_s, gap): iter((bench.published(*args),))  # type: ignore[misc]
    for count, size, share, within_s in SYNTHETIC:
        made = (count, size, share, within_s)
        yield (
            f"synthetic{count}" + (f"-regions-of-{size}" if size else ""),
            lambda args=made: iter((bench.made_up(*args),)),  # type: ignore[misc]
        )
    for name, flow, most, within_s in FRONTIER:
        yield (
            f"{name} at {flow:g}: stages",
            lambda args=(name, flow, most, within_s): iter((bench.shallow(*args),)),  # type: ignore[misc]
        )
    for name, within_s in LOSSES:
        yield f"{name} lose one", lambda args=(name, within_s): bench.losing(*args)  # type: ignore[misc]


def _own_stdout() -> TextIO:
    """Stdout as a file of our own: HiGHS prints its licence on descriptor 1."""
    own = os.fdopen(os.dup(1), "w")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
    return own


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="WORD", help="only rows whose name contains one of these")
    parser.add_argument("--clusters", type=Path, default=CLUSTERS, help="folder of helixd-cluster/1 files")
    parser.add_argument("--time-limit", type=float, help="seconds per plan instead of each row's own limit")
    options = parser.parse_args()
    if not options.clusters.is_dir():
        print(f"no clusters in {options.clusters}: name their folder with --clusters", file=sys.stderr)
        return 2
    out = _own_stdout()
    bench = Bench(options.clusters, options.time_limit)
    if not bench.judge.there():
        print("evaluate_plan.py is not beside the clusters: flows are not checked independently", file=sys.stderr)
    sys.setrecursionlimit(100_000)
    head = f"{'row':44}{'asked':>11}{'flow':>11}{'bound':>11}{'gap %':>7}{'depth':>7}{'cpu s':>7}{'within':>7}  checked"
    print(head, file=out, flush=True)
    missed = 0
    for name, make in _rows(bench):
        if options.words and not any(word in name for word in options.words):
            continue
        for row in make():
            missed += row.right is False or bool(row.short)
            print(_line(row), file=out, flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
