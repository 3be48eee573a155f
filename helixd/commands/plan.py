"""`helixd plan`: a cluster file to a plan, with a proof of how good it is. Starts no daemon and opens no connection.

The search runs in the planner's own process, so that a limit or Ctrl-C ends it at once; the plan goes to stdout,
everything else to stderr.
"""

import argparse
import asyncio
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from helixd.commands.cluster_source import load_cluster, with_current
from helixd.commands.failure import CommandFailed
from helixd.commands.plan_report import Report, report
from helixd.commands.progress import Progress
from helixd.commands.simulate_inputs import DEFAULT_TIME_LIMIT_S
from helixd.config.units import parse_duration_s, parse_size_bytes
from helixd.exits import Exit
from helixd.ids import NodeId
from helixd.layers import LayerRange
from helixd.plan.baselines import BASELINES
from helixd.plan.cluster.spec import ClusterSpec
from helixd.plan.plan import Infeasible
from helixd.plan.planner import OBJECTIVES
from helixd.solver.job import Job, Reload
from helixd.solver.process import Outcome, PlannerFailed, solve

# Columns of a table that no terminal bounds.
_WIDE = 160

DEFAULT_LOAD_BYTES_PER_S = 500.0 * 2**20
DEFAULT_HORIZON_S = 3600.0

DESCRIPTION = """\
Say where the layers of a model should go on machines that you describe, and what they would serve. Nothing is
started, loaded or downloaded.

The cluster file (JSON or TOML) lists the machines, what they are, and the links between them; docs/planning.md tells
its keys. A machine that was never measured is named by its hardware ("RTX 4090"), and its speed is estimated."""

EXAMPLES = """\
the plan, and how it compares with other rules for placing layers:
  helixd plan cluster.toml
  helixd plan cluster.toml --compare

for a model you have: sizes from its config.json, speeds derived for it:
  helixd plan cluster.toml --model /srv/models/llama

a plan that goes on when any one machine is lost, and what that costs:
  helixd plan cluster.toml --survive 1

keep what is loaded where it is, as far as that is good; then a picture:
  helixd plan cluster.toml --json > now.json
  helixd plan cluster.toml --current now.json --svg plan.svg

the table:
  layers     the range [start, end) that the node holds     share   of all tokens, how many pass through the node
  KV tokens  tokens it can keep for each of these layers     busy    of T, how much is used
  T          tokens/s it computes with so many layers        next    where tokens go on, "out" after the last layer
"max flow" counts prompt and output tokens of the workload together and ignores waiting; "whole cluster" is the output
people see. A gap is how far a better plan could be ahead at most.

exit status: 0 a plan was found, 2 usage, 65 a file that makes no sense, 66 a file that cannot be read,
69 the cluster cannot hold the model, 70 the planner failed, 73 --svg cannot be written, 130 interrupted."""


def build_parser() -> argparse.ArgumentParser:
    """The subcommand's parser."""
    parser = argparse.ArgumentParser(
        prog="helixd plan",
        usage="helixd plan CLUSTER [options]",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("cluster", metavar="CLUSTER", type=Path, help="cluster file, format helixd-cluster/1")
    group = parser.add_argument_group("what to plan")
    group.add_argument(
        "--model", metavar="DIR", help='plan for this checkpoint instead of the file\'s model, or "demo"'
    )
    group.add_argument(
        "--objective", choices=OBJECTIVES, default=OBJECTIVES[0],
        help="throughput: predicted output of the busy cluster (default); max-flow: the paper's; "
        "latency: fewest and fastest hops",
    )  # fmt: skip
    group.add_argument(
        "--survive", metavar="N", type=int, choices=(0, 1),
        help="1: a pipeline is left whichever one node is lost; 0: do not care; left out: if it costs little",
    )  # fmt: skip
    group.add_argument("--current", metavar="PLAN", type=Path, help="what nodes hold now, as printed by --json")
    group.add_argument(
        "--load-speed", metavar="SIZE", type=_size, default=DEFAULT_LOAD_BYTES_PER_S,
        help="with --current: bytes/s at which a node loads weights (default 500MiB)",
    )  # fmt: skip
    group.add_argument(
        "--horizon", metavar="S", type=_duration_s, default=DEFAULT_HORIZON_S,
        help="with --current: how long the plan is to stay; what pays for its loading within that moves (default 1h)",
    )  # fmt: skip
    group = parser.add_argument_group("search")
    group.add_argument(
        "--time-limit", metavar="S", type=_duration_s, default=DEFAULT_TIME_LIMIT_S,
        help=f"longest search for a plan, simulating the best ones included (default {DEFAULT_TIME_LIMIT_S:.0f} s)",
    )  # fmt: skip
    group.add_argument(
        "--predict-only", action="store_true",
        help="objective throughput: take the plan predicted best, without simulating any",
    )  # fmt: skip
    group.add_argument("--seed", metavar="N", type=int, default=0, help="another seed is another search (default 0)")
    group = parser.add_argument_group("what to show")
    group.add_argument("--json", action="store_true", help="print one JSON object")
    group.add_argument("--compare", action="store_true", help=f"also plan by other rules: {', '.join(BASELINES)}")
    group.add_argument("--frontier", action="store_true", help="also show what flow costs in depth")
    group.add_argument("--svg", metavar="FILE", type=Path, help="also draw the plan")
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the subcommand and return its exit status."""
    arguments = build_parser().parse_args(argv)
    try:
        found = _plan(arguments)
        if arguments.svg is not None:
            _draw(found, arguments.svg)
        _print(found, as_json=arguments.json)
    except CommandFailed as error:
        print(f"helixd plan: {error}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        print("helixd plan: interrupted", file=sys.stderr)
        return Exit.INTERRUPTED
    except BrokenPipeError:
        # Whoever read has enough; nothing more is written, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return Exit.OK


def _plan(arguments: argparse.Namespace) -> Report:
    spec = load_cluster(arguments.cluster, model=arguments.model)
    if arguments.current is not None:
        spec = with_current(spec, arguments.current)
    job = Job(
        spec,
        time_limit_s=arguments.time_limit,
        objective=arguments.objective,
        seed=arguments.seed,
        survive=arguments.survive,
        price=arguments.survive == 1,
        baselines=tuple(BASELINES) if arguments.compare else (),
        frontier=arguments.frontier,
        simulate=arguments.objective == "throughput" and not arguments.predict_only,
        in_force=_held_now(spec),
        reload=Reload(arguments.load_speed, arguments.horizon) if _held_now(spec) else None,
    )
    try:
        outcome = asyncio.run(_solve(job, sys.stderr))
    except Infeasible as error:
        raise CommandFailed(str(error), Exit.INFEASIBLE) from error
    except PlannerFailed as error:
        raise CommandFailed(str(error), Exit.INTERNAL) from error
    return report(spec, outcome, objective=arguments.objective, seed=arguments.seed)


def _held_now(spec: ClusterSpec) -> dict[NodeId, LayerRange] | None:
    held = {node.id: node.current_range for node in spec.nodes if node.current_range is not None}
    return held or None


async def _solve(job: Job, stderr: TextIO) -> Outcome:
    with Progress(stderr) as progress:
        return await solve(job, on_progress=progress.show)


def _draw(found: Report, path: Path) -> None:
    from helixd.commands.plan_svg import plan_svg

    try:
        path.write_text(plan_svg(found), encoding="utf-8")
    except OSError as error:
        raise CommandFailed(f"{path}: cannot be written: {error.strerror}", Exit.CANNOT_WRITE) from error


def _print(found: Report, *, as_json: bool) -> None:
    if as_json:
        from helixd.commands.plan_json import plan_json

        print(plan_json(found), flush=True)
        return
    from rich.console import Console

    from helixd.commands.plan_text import show

    bounded = sys.stdout.isatty() or "COLUMNS" in os.environ
    show(Console(file=sys.stdout, width=None if bounded else _WIDE), found)
    sys.stdout.flush()


def _size(text: str) -> float:
    try:
        size_bytes = parse_size_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if size_bytes <= 0:
        raise argparse.ArgumentTypeError("must be above 0")
    return float(size_bytes)


def _duration_s(text: str) -> float:
    try:
        seconds = parse_duration_s(float(text) if text.replace(".", "", 1).isdigit() else text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError("must be above 0")
    return seconds
