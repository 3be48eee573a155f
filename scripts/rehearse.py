#!/usr/bin/env python3
"""Rehearse a cluster on this machine: real daemons, frames and HTTP, machines that only take the time.

    scripts/rehearse.py CLUSTER [--plan FILE] [--time-scale 4] [--window 120] [--warm-up 60]
                        [--in-flight N | --rate TOKENS_PER_S] [--lengths FILE] [--json]

CLUSTER is a file of the format helixd-cluster/1. A coordinator and one emulated worker per node are started; requests
of the lengths in FILE (rows "input_tokens,output_tokens") go through the API. --plan pins a placement; without it the
coordinator plans. Figures are in the cluster's seconds. If this machine was more than 70 % busy in the window, its own
slowness would be part of the figures: the run is then repeated at twice the scale, up to --max-scale.
"""

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from rehearsal_cluster import MODEL, RehearsalCluster, RehearsalFailed, Stage
from rehearsal_load import Lengths, LoadPlan, Measured, RehearsalLoad

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from helixd.emulation.hollow import write_hollow_checkpoint
from helixd.errors import HelixError
from helixd.ids import NodeId
from helixd.layers import LayerRange
from helixd.plan.clusterfile import parse_cluster

BUSY_LIMIT = 0.7
DEFAULT_LENGTHS: tuple[Lengths, ...] = ((100, 60), (300, 150), (700, 250), (1200, 300), (1500, 400))


@dataclass(frozen=True, slots=True)
class Rehearsed:
    """One run's figures and what they were got under."""

    time_scale: float
    busy_share: float
    placement: dict[str, list[int]]
    max_flow_tokens_per_s: float | None
    measured: Measured

    def as_json(self) -> dict[str, Any]:
        """Fit for `--json`."""
        m = self.measured
        return {
            "time_scale": self.time_scale,
            "busy_share": round(self.busy_share, 3),
            "window_s": m.window_s,
            "placement": self.placement,
            "max_flow_tokens_per_s": self.max_flow_tokens_per_s,
            "decode_tokens_per_s": m.decode_tokens_per_s,
            "total_tokens_per_s": m.decode_tokens_per_s + m.prompt_tokens / m.window_s,
            "ttft_s": _spread(m.ttft_s),
            "tpot_s": _spread(m.tpot_s),
            "finished": m.finished,
            "errors": len(m.errors),
        }


def _spread(values: list[float]) -> dict[str, float | None]:
    if not values:
        return {"p50": None, "p95": None, "mean": None}
    ordered = sorted(values)
    p50, p95 = (ordered[min(len(ordered) - 1, int(len(ordered) * share))] for share in (0.5, 0.95))
    return {"p50": p50, "p95": p95, "mean": statistics.fmean(values)}


async def rehearse(cluster: RehearsalCluster, load: LoadPlan) -> Rehearsed:
    """Put the load on a cluster that serves."""
    timeout = aiohttp.ClientTimeout(total=None, sock_read=None)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        client = RehearsalLoad(session, load)
        async with asyncio.TaskGroup() as tasks:
            busy = tasks.create_task(_busy_share(load), name="busy")
            measured = await client.run()
    cluster.check()
    view = cluster.get("/cluster")
    placement = {node["id"]: node["layers"] for node in view["nodes"] if node["layers"]}
    flow = (view.get("plan") or {}).get("max_flow_tokens_per_s")
    scale = load.time_scale
    return Rehearsed(scale, busy.result(), placement, None if flow is None else flow * scale, measured)


async def _busy_share(load: LoadPlan) -> float:
    await asyncio.sleep(load.warm_up_s * load.time_scale)
    psutil.cpu_percent()
    await asyncio.sleep(load.window_s * load.time_scale * 0.98)
    return float(psutil.cpu_percent()) / 100


def read_data(path: Path) -> Any:
    """JSON or TOML by the file's ending. Raises OSError, ValueError."""
    text = path.read_text(encoding="utf-8")
    return tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)


def read_lengths(path: Path) -> tuple[Lengths, ...]:
    """Rows `input_tokens,output_tokens`; a header is passed over. Raises OSError, ValueError."""
    rows = [line.split(",") for line in path.read_text().splitlines() if line[:1].isdigit()]
    return tuple((int(row[0]), int(row[1])) for row in rows)


def show(run: Rehearsed) -> None:
    """Print it for people."""
    m, figures = run.measured, run.as_json()
    print(f"time scale {run.time_scale:g}, window {m.window_s:g} s, this machine {run.busy_share:.0%} busy")
    print(f"  {m.decode_tokens_per_s:8.1f} decode tokens/s, {figures['total_tokens_per_s']:.1f} with prompts")
    for name in ("ttft_s", "tpot_s"):
        spread = figures[name]
        if spread["p50"] is not None:
            print(f"  {name[:-2]}: p50 {spread['p50']:.3f} s, p95 {spread['p95']:.3f} s, mean {spread['mean']:.3f} s")
    print(f"  {m.finished} requests ended, {len(m.errors)} errors{': ' + m.errors[0] if m.errors else ''}")


def main() -> int:
    """Rehearse, slower if need be, and print."""
    options = _parser().parse_args()
    try:
        spec = parse_cluster(read_data(options.cluster))
        placement = None
        if options.plan is not None:
            pairs = read_data(options.plan)["placement"]
            placement = {NodeId(node): LayerRange(*pair) for node, pair in pairs.items()}
        lengths = read_lengths(options.lengths) if options.lengths else DEFAULT_LENGTHS
    except (OSError, ValueError, KeyError, HelixError) as error:
        print(f"rehearse.py: {error}", file=sys.stderr)
        return 2
    scale = options.time_scale
    while True:
        with tempfile.TemporaryDirectory(prefix="rehearsal-") as name:
            home = Path(name)
            hollow = write_hollow_checkpoint(home / "model", spec)
            stage = Stage(
                options.cluster.resolve(), spec, home / "model", hollow, scale, placement, tuple(options.set)
            )  # fmt: skip
            try:
                with RehearsalCluster(home, stage) as cluster:
                    cluster.wait_ready()
                    mean = statistics.fmean(sum(pair) for pair in lengths)
                    load = LoadPlan(
                        f"http://{cluster.api}", MODEL, lengths, options.warm_up, options.window, scale, options.seed,
                        None if options.rate else options.in_flight, options.rate / mean if options.rate else None,
                    )  # fmt: skip
                    run = asyncio.run(rehearse(cluster, load))
            except RehearsalFailed as error:
                print(f"rehearse.py: {error}", file=sys.stderr)
                return 1
        if run.busy_share <= BUSY_LIMIT or scale * 2 > options.max_scale:
            break
        print(f"{run.busy_share:.0%} busy at scale {scale:g}: again at {scale * 2:g}", file=sys.stderr)
        scale *= 2
    if options.json:
        print(json.dumps(run.as_json()))
    else:
        show(run)
    return 0 if not run.measured.errors and run.busy_share <= BUSY_LIMIT else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cluster", type=Path, metavar="CLUSTER")
    parser.add_argument("--plan", type=Path, metavar="FILE", help='a placement: {"placement": {node: [start, end)}}')
    parser.add_argument("--time-scale", type=float, default=4.0, help="seconds here per second of the cluster [4]")
    parser.add_argument("--max-scale", type=float, default=32.0, help="do not repeat slower than this [32]")
    parser.add_argument("--warm-up", type=float, default=60.0, help="the cluster's seconds before the window [60]")
    parser.add_argument("--window", type=float, default=120.0, help="the cluster's seconds that are measured [120]")
    parser.add_argument("--in-flight", type=int, default=300, help="open requests at any time [300]")
    parser.add_argument("--rate", type=float, help="instead: tokens/s offered, prompt and output together")
    parser.add_argument("--lengths", type=Path, metavar="FILE", help="rows input_tokens,output_tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the coordinator")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


if __name__ == "__main__":
    sys.exit(main())
