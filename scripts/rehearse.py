#!/usr/bin/env python3
"""Rehearse a cluster on this machine: real daemons, frames and HTTP, machines that only take the time.

    scripts/rehearse.py CLUSTER [--plan PLAN] [--time-scale 4] [--warm-up 60] [--window 120]
                        [--in-flight N | --rate TOKENS_PER_S [--arrivals FILE]] [--trace FILE] [--json]

CLUSTER is a file of the format helixd-cluster/1. A coordinator and one emulated worker per node are started, and
requests go through the API: so many clients that the cluster is full, or --in-flight, or arrivals at --rate. Lengths
are those of --trace (CSV with columns input_tokens and output_tokens), else spread around the file's workload. --plan
pins a placement: a plan file, or the name of a rule; without it the coordinator plans.

Then the same plan is simulated under the same load (what helixd simulate does), and both are printed. Figures are in
the cluster's seconds. A machine that is more than 70 % busy (--busy-limit) is part of what it measures: such a run does
not count, it is broken off as soon as that shows and repeated at a slower scale, up to --max-scale.
"""

import argparse
import asyncio
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import uvloop
from rehearsal_cluster import MODEL, RehearsalCluster, RehearsalFailed, Stage
from rehearsal_load import LoadPlan, Measured, RehearsalLoad
from rehearsal_twin import clients_for, served_plan, simulated

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from helixd.commands.cluster_source import load_cluster
from helixd.commands.failure import CommandFailed
from helixd.commands.simulate_inputs import the_plan
from helixd.commands.trace_file import load_counts, load_lengths
from helixd.emulation.hollow import write_hollow_checkpoint
from helixd.plan.cluster.spec import ClusterSpec
from helixd.plan.plan import Plan
from helixd.sim.load import Lengths, Load, Offline, Online
from helixd.sim.meter import Quantiles, Report
from helixd.sim.stage_node import StepLimits

BUSY_LIMIT = 0.7
BUSY_AIM = 0.8
"""A repeated run aims at so much of the limit."""

SAMPLE_S = 2.0
"""How busy the machine is is asked so often, in seconds here."""


@dataclass(frozen=True, slots=True)
class Rehearsed:
    """One run's figures, what they were got under, and what the simulator says. `cpu` is seconds per second here."""

    time_scale: float
    busy_share: float
    cpu: dict[str, float]
    plan: Plan
    load: Load
    measured: Measured
    twin: Report

    @property
    def ratio(self) -> float:
        """Decode tokens/s, measured by simulated."""
        simulated = self.twin.decode_tokens_per_s
        return self.measured.decode_tokens_per_s / simulated if simulated else 0.0

    def as_json(self) -> dict[str, Any]:
        """Fit for `--json`."""
        m, twin = self.measured, self.twin
        return {
            "time_scale": self.time_scale,
            "busy_share": round(self.busy_share, 3),
            "cpu_share": {name: round(share, 3) for name, share in self.cpu.items()},
            "warm_up_s": self.load.warmup_s,
            "window_s": m.window_s,
            "in_flight": self.load.in_flight if isinstance(self.load, Offline) else None,
            "placement": {node: list(layers.to_pair()) for node, layers in self.plan.placement.items()},
            "max_flow_tokens_per_s": self.plan.max_flow_tokens_per_s,
            "ratio": self.ratio,
            "rehearsed": _figures(
                m.decode_tokens_per_s, m.prompt_tokens / m.window_s, Quantiles.of(m.ttft_s), Quantiles.of(m.tpot_s),
                m.finished,
            ),
            "simulated": _figures(
                twin.decode_tokens_per_s, twin.prompt_tokens_per_s, twin.ttft_s, twin.tpot_s, twin.finished
            ),
            "preempted": {"simulated": twin.preempted},
            "errors": m.errors[:20],
        }  # fmt: skip


def _figures(decode: float, prompt: float, ttft: Quantiles, tpot: Quantiles, finished: int) -> dict[str, Any]:
    return {
        "decode_tokens_per_s": decode,
        "total_tokens_per_s": decode + prompt,
        "ttft_s": {"p50": ttft.p50, "p95": ttft.p95, "mean": ttft.mean},
        "tpot_s": {"p50": tpot.p50, "p95": tpot.p95, "mean": tpot.mean},
        "finished": finished,
    }


class TooBusy(Exception):
    """This machine cannot keep up at this scale; `share` is how busy it is."""

    def __init__(self, share: float) -> None:
        super().__init__(f"{share:.0%} busy")
        self.share = share


class Watch:
    """How busy the machine and the daemons are, from the second half of the warm-up on.

    Raises TooBusy as soon as that shows, RehearsalFailed if a daemon ends.
    """

    def __init__(self, cluster: RehearsalCluster, load: LoadPlan, busy_limit: float) -> None:
        self._cluster = cluster
        self._limit = busy_limit
        self._warm_up_s = load.load.warmup_s * load.time_scale
        self._window_s = load.load.measure_s * load.time_scale
        self.busy_share = 0.0
        self.cpu: dict[str, float] = {}

    async def run(self) -> None:
        """Until shortly before the window ends."""
        await asyncio.sleep(self._warm_up_s / 2)
        await self._over(self._warm_up_s / 2)
        before = self._cluster.cpu_seconds()
        self.busy_share = await self._over(self._window_s * 0.98)
        after = self._cluster.cpu_seconds()
        self.cpu = {name: (after[name] - before[name]) / (self._window_s * 0.98) for name in after}

    async def _over(self, seconds: float) -> float:
        """The mean over so many seconds."""
        psutil.cpu_percent()
        shares: list[float] = []
        samples = max(1, round(seconds / SAMPLE_S))
        for _ in range(samples):
            await asyncio.sleep(seconds / samples)
            self._cluster.check()
            shares.append(psutil.cpu_percent() / 100)
            mean = sum(shares) / len(shares)
            if len(shares) >= max(5, samples // 3) and mean > self._limit:
                raise TooBusy(mean)
        if mean > self._limit:
            raise TooBusy(mean)
        return mean


async def put_load(cluster: RehearsalCluster, load: LoadPlan, busy_limit: float) -> tuple[Measured, Watch]:
    """Put the load on a cluster that serves. Raises TooBusy, RehearsalFailed."""
    timeout = aiohttp.ClientTimeout(total=None, sock_read=None)
    watch = Watch(cluster, load, busy_limit)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        client = RehearsalLoad(session, load)
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(watch.run(), name="watch")
                measured = await client.run()
        except* (TooBusy, RehearsalFailed) as found:
            raise found.exceptions[0] from None
    cluster.check()
    return measured, watch


@dataclass(frozen=True, slots=True)
class Script:
    """What is rehearsed."""

    file: Path
    spec: ClusterSpec
    plan: Plan | None
    lengths: Lengths
    load: Load
    limits: StepLimits
    seed: int
    settings: tuple[str, ...]
    busy_limit: float


def rehearse(script: Script, time_scale: float) -> Rehearsed:
    """One run. Raises TooBusy, RehearsalFailed."""
    spec = script.spec
    with tempfile.TemporaryDirectory(prefix="rehearsal-") as name:
        home = Path(name)
        hollow = write_hollow_checkpoint(home / "model", spec)
        placement = None if script.plan is None else script.plan.placement
        stage = Stage(
            script.file, spec, home / "model", hollow, time_scale, placement,
            script.limits, script.settings,
        )  # fmt: skip
        with RehearsalCluster(home, stage) as cluster:
            cluster.wait_ready()
            plan = served_plan(cluster.wait_view(), spec.model.num_layers, time_scale)
            load = script.load
            if isinstance(load, Offline):
                load = clients_for(spec, plan, script.limits, script.lengths, load, script.seed)
            sent = LoadPlan(f"http://{cluster.api}", MODEL, script.lengths, load, time_scale, script.seed)
            measured, watch = uvloop.run(put_load(cluster, sent, script.busy_limit))
    twin = simulated(spec, plan, script.limits, script.lengths, load, script.seed)
    return Rehearsed(time_scale, watch.busy_share, watch.cpu, plan, load, measured, twin)


def show(run: Rehearsed) -> None:
    """Print it for people."""
    found = run.as_json()
    clients = f", {found['in_flight']} clients" if found["in_flight"] else ""
    print(
        f"{len(run.plan.placement)} nodes, time scale {run.time_scale:g}, window {run.measured.window_s:g} s after"
        f" {run.load.warmup_s:g} s{clients}; this machine {run.busy_share:.0%} busy"
        f" (coordinator {run.cpu.get('coordinator', 0.0):.0%} of a core)"
    )
    print(f"{'':24}{'rehearsed':>12}{'simulated':>12}{'ratio':>8}")
    real, twin = found["rehearsed"], found["simulated"]
    rows = [(name.replace("_per_s", "/s").replace("_", " "), real[name], twin[name]) for name in list(real)[:2]]
    for name in ("ttft_s", "tpot_s"):
        rows += [(f"{name[:4]} {at}, s", real[name][at], twin[name][at]) for at in ("p50", "p95")]
    rows.append(("requests ended", real["finished"], twin["finished"]))
    for label, a, b in rows:
        print(f"{label:24}{a:12.5g}{b:12.5g}{a / b if b else 0.0:8.3f}")
    errors = run.measured.errors
    if errors:
        print(f"{len(errors)} errors, the first: {errors[0]}")


def main() -> int:
    """Rehearse, slower if need be, and print."""
    options = _parser().parse_args()
    try:
        script = _script(options)
    except CommandFailed as error:
        print(f"rehearse.py: {error}", file=sys.stderr)
        return error.status
    scale = options.time_scale
    while True:
        try:
            run = rehearse(script, scale)
        except TooBusy as found:
            slower = round(scale * max(1.25, found.share / (BUSY_AIM * max(script.busy_limit, 0.1))), 2)
            if slower > options.max_scale:
                print(
                    f"rehearse.py: this machine is {found} at scale {scale:g}: too much to count, and slower than"
                    f" --max-scale {options.max_scale:g} is not allowed",
                    file=sys.stderr,
                )
                return 1
            print(f"{found} at scale {scale:g}: does not count, again at {slower:g}", file=sys.stderr)
            scale = slower
            continue
        except RehearsalFailed as error:
            print(f"rehearse.py: {error}", file=sys.stderr)
            return 1
        break
    if options.json:
        print(json.dumps(run.as_json()))
    else:
        show(run)
    return 1 if run.measured.errors else 0


def _script(options: argparse.Namespace) -> Script:
    spec = load_cluster(options.cluster)
    plan = None if options.plan is None else the_plan(options.plan, spec, seed=options.seed)
    if options.trace is not None:
        lengths, _ = load_lengths(options.trace)
    else:
        workload = spec.workload
        lengths = Lengths.around(workload.mean_input_tokens, workload.mean_output_tokens, seed=options.seed)
    load: Load
    if options.rate is not None:
        counts = load_counts(options.arrivals) if options.arrivals else ()
        load = Online(options.rate, counts, warmup_s=options.warm_up, measure_s=options.window)
    else:
        load = Offline(options.in_flight, warmup_s=options.warm_up, measure_s=options.window)
    return Script(
        options.cluster.resolve(), spec, plan, lengths, load, StepLimits(), options.seed, tuple(options.set),
        options.busy_limit,
    )  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cluster", type=Path, metavar="CLUSTER")
    parser.add_argument("--plan", metavar="PLAN", help="plan file, auto, or the name of a rule for placing layers")
    parser.add_argument("--time-scale", type=float, default=4.0, help="seconds here per second of the cluster [4]")
    parser.add_argument("--max-scale", type=float, default=32.0, help="do not repeat slower than this [32]")
    parser.add_argument("--busy-limit", type=float, default=BUSY_LIMIT, help=f"busier does not count [{BUSY_LIMIT}]")
    parser.add_argument("--warm-up", type=float, default=60.0, help="the cluster's seconds before the window [60]")
    parser.add_argument("--window", type=float, default=120.0, help="the cluster's seconds that are measured [120]")
    load = parser.add_mutually_exclusive_group()
    load.add_argument("--in-flight", type=int, help="clients, each with one request at any time [as many as fill it]")
    load.add_argument("--rate", type=float, help="instead: tokens/s offered, prompt and output together")
    parser.add_argument("--arrivals", type=Path, metavar="FILE", help="with --rate: requests per 3 s, for their bursts")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="lengths: CSV, input_tokens and output_tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the coordinator")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


if __name__ == "__main__":
    sys.exit(main())
