"""`helixd simulate`: what a plan would serve, and how fast, before any machine is bought. Starts no daemon.

Everything happens in simulated time with the router that the coordinator uses; results go to stdout, the rest to
stderr.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from helixd.commands.cluster_source import load_cluster
from helixd.commands.failure import CommandFailed
from helixd.commands.simulate_inputs import the_plan
from helixd.commands.simulate_report import Simulated
from helixd.commands.trace_file import load_counts, load_lengths
from helixd.exits import Exit
from helixd.ids import NodeId
from helixd.plan.baselines import BASELINES
from helixd.plan.cluster.spec import ClusterSpec
from helixd.plan.plan import Plan
from helixd.sim.helixd import CHOOSERS, HelixdPolicy
from helixd.sim.load import Lengths, Load, Offline, Online, Trace
from helixd.sim.meter import Report
from helixd.sim.paper import SCHEDULERS, PaperPolicy
from helixd.sim.script import Happening, SimulationStopped

_WIDE = 160

# What a run may be asked for: beyond it a run would not end, or say anything.
MOST_TOKENS_PER_S = 1_000_000.0
MOST_REQUESTS = 100_000
LEAST_MEASURE_S, MOST_S = 1.0, 1_000_000.0

_POLICIES = (
    "helixd",
    *(f"helixd/{chooser}" for chooser in CHOOSERS if chooser != "flow"),
    *("paper" if scheduler == "max-flow" else f"paper/{scheduler}" for scheduler in SCHEDULERS),
)

DESCRIPTION = """\
Serve requests on a cluster that a file describes, in simulated time: how many tokens/s, how long people wait, which
machine is the bottleneck, where the time goes.

PLAN is a file that helixd plan --json printed, "auto" for a plan made now, or a rule for placing layers:
{rules}."""

EXAMPLES = """\
as much work as fits, and at a given rate:
  helixd simulate cluster.toml auto
  helixd simulate cluster.toml plan.json --rate 700

your own requests, and what other placements would make of them:
  helixd simulate cluster.toml plan.json --rate 700 --trace lengths.csv --compare petals swarm old.json

a machine that dies after five minutes and is back after ten:
  helixd simulate cluster.toml plan.json --rate 300 --fail n7@300 --join n7@600

--trace FILE is CSV with columns input_tokens and output_tokens, drawn at random; with a third, arrival_s, they are the
requests themselves. --arrivals FILE is CSV with a column requests: how many came in each 3 s, for bursts as they are.
Without --trace, lengths spread around the workload's means of the cluster file.

policies: helixd is what this engine and its coordinator do; helixd/NAME draws routes by another rule. paper is the
simulator of the Helix paper, with its scheduler or another.

exit status: 0 done, 2 usage, 65 a file that makes no sense, 66 a file that cannot be read, 69 the cluster cannot hold
the model, 70 the planner failed, 73 --svg cannot be written, 130 interrupted."""


def build_parser() -> argparse.ArgumentParser:
    """The subcommand's parser."""
    parser = argparse.ArgumentParser(
        prog="helixd simulate",
        usage="helixd simulate CLUSTER PLAN [options]",
        description=DESCRIPTION.format(rules=", ".join(BASELINES)),
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("cluster", metavar="CLUSTER", type=Path, help="cluster file, format helixd-cluster/1")
    parser.add_argument("plan", metavar="PLAN", help="plan file, auto, or the name of a rule")
    group = parser.add_argument_group("requests")
    load = group.add_mutually_exclusive_group()
    load.add_argument("--offline", action="store_true", help="as much work as fits (default)")
    load.add_argument("--rate", metavar="TOKENS", type=_rate, help="tokens/s that arrive, prompts and output")
    group.add_argument("--in-flight", metavar="N", type=_requests, help="with --offline: keep so many requests running")
    group.add_argument("--trace", metavar="FILE", type=Path, help="lengths of requests, perhaps with their arrivals")
    group.add_argument("--arrivals", metavar="FILE", type=Path, help="with --rate: requests per 3 s, for their bursts")
    group = parser.add_argument_group("how it runs")
    group.add_argument("--policy", choices=_POLICIES, default="helixd", metavar="NAME", help=", ".join(_POLICIES))
    group.add_argument("--chunk", metavar="TOKENS", type=_whole, help="policy helixd: prompt tokens of one step")
    group.add_argument("--feedback", action="store_true", help="policy helixd: last stage to first stage directly")
    group.add_argument("--warm-up", metavar="S", type=_seconds, help="not measured (default: offline 60, else 0)")
    group.add_argument("--measure", metavar="S", type=_window, help="measured (default: offline 600, else 1800)")
    group.add_argument("--fail", metavar="NODE@S", type=_moment, action="append", default=[], help="a node dies")
    group.add_argument("--join", metavar="NODE@S", type=_moment, action="append", default=[], help="it is back")
    group.add_argument("--seed", metavar="N", type=int, default=0, help="other chance (default 0)")
    group = parser.add_argument_group("what to show")
    group.add_argument("--compare", metavar="PLAN", nargs="+", default=[], help="simulate these too")
    group.add_argument("--json", action="store_true", help="print one JSON object")
    group.add_argument("--svg", metavar="FILE", type=Path, help="also draw it")
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the subcommand and return its exit status."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    if arguments.in_flight is not None and arguments.rate is not None:
        parser.error("--in-flight goes with --offline")
    if arguments.arrivals is not None and arguments.rate is None:
        parser.error("--arrivals goes with --rate")
    if (arguments.fail or arguments.join or arguments.chunk or arguments.feedback) and arguments.policy[:5] == "paper":
        parser.error("--fail, --join, --chunk and --feedback go with policy helixd")
    try:
        found = _simulate(arguments)
        if arguments.svg is not None:
            _draw(found, arguments.svg)
        _print(found, as_json=arguments.json)
    except CommandFailed as error:
        print(f"helixd simulate: {error}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        print("helixd simulate: interrupted", file=sys.stderr)
        return Exit.INTERRUPTED
    except BrokenPipeError:
        # Whoever read has enough; nothing more is written, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return Exit.OK


def _simulate(arguments: argparse.Namespace) -> list[Simulated]:
    spec = load_cluster(arguments.cluster)
    lengths, trace = _lengths(arguments, spec)
    load = _load(arguments, trace)
    script = _script(arguments, spec)
    found: list[Simulated] = []
    for name in (arguments.plan, *arguments.compare):
        try:
            plan = the_plan(name, spec, seed=arguments.seed)
        except CommandFailed as error:
            # What it is compared with may be impossible; that is an answer too.
            if not found or error.status != Exit.INFEASIBLE:
                raise
            found[0].impossible[name] = str(error).removeprefix(f"{name}: ")
            continue
        with _Line(f"simulating {name}") as line:
            try:
                report = _run(arguments, spec, plan, load, lengths, script, line)
            except SimulationStopped as error:
                raise CommandFailed(f"{name}: {error}", Exit.BAD_DATA) from error
            except ValueError as error:
                raise CommandFailed(f"{arguments.cluster}: {error}", Exit.BAD_DATA) from error
        found.append(Simulated(name, spec, plan, load, report))
    return found


def _run(
    arguments: argparse.Namespace, spec: ClusterSpec, plan: Plan, load: Load, lengths: Lengths,
    script: Sequence[Happening], line: "_Line",
) -> Report:  # fmt: skip
    kind, _, rule = arguments.policy.partition("/")
    if kind == "paper":
        paper = PaperPolicy(rule or "max-flow")
        return paper.run(spec, plan, load, lengths, seed=arguments.seed, progress=line.show)
    policy = HelixdPolicy(chooser=rule or "flow", feedback=arguments.feedback)
    if arguments.chunk is not None:
        policy = replace(policy, limits=replace(policy.limits, chunk_tokens=arguments.chunk))
    return policy.run(spec, plan, load, lengths, seed=arguments.seed, script=script, progress=line.show)


def _lengths(arguments: argparse.Namespace, spec: ClusterSpec) -> tuple[Lengths, Trace | None]:
    if arguments.trace is not None:
        return load_lengths(arguments.trace)
    workload = spec.workload
    return Lengths.around(workload.mean_input_tokens, workload.mean_output_tokens, seed=arguments.seed), None


def _load(arguments: argparse.Namespace, trace: Trace | None) -> Load:
    load: Load
    if arguments.rate is not None:
        load = Online(arguments.rate, load_counts(arguments.arrivals) if arguments.arrivals else ())
    elif trace is not None and not arguments.offline and arguments.in_flight is None:
        load = trace
    else:
        load = Offline(arguments.in_flight)
    if arguments.warm_up is not None:
        load = replace(load, warmup_s=arguments.warm_up)
    return load if arguments.measure is None else replace(load, measure_s=arguments.measure)


def _script(arguments: argparse.Namespace, spec: ClusterSpec) -> list[Happening]:
    known = {node.id for node in spec.nodes}
    script = [Happening(at_s, node, "fails") for node, at_s in arguments.fail]
    script += [Happening(at_s, node, "joins") for node, at_s in arguments.join]
    for happening in script:
        if happening.node not in known:
            raise CommandFailed(f"cluster {spec.name} has no node {happening.node}", Exit.BAD_DATA)
    return script


def _draw(found: list[Simulated], path: Path) -> None:
    from helixd.commands.simulate_svg import simulate_svg

    try:
        path.write_text(simulate_svg(found), encoding="utf-8")
    except OSError as error:
        raise CommandFailed(f"{path}: cannot be written: {error.strerror}", Exit.CANNOT_WRITE) from error


def _print(found: list[Simulated], *, as_json: bool) -> None:
    if as_json:
        from helixd.commands.simulate_report import simulate_json

        print(simulate_json(found), flush=True)
        return
    from rich.console import Console

    from helixd.commands.simulate_text import show

    bounded = sys.stdout.isatty() or "COLUMNS" in os.environ
    show(Console(file=sys.stdout, width=None if bounded else _WIDE), found)
    sys.stdout.flush()


class _Line:
    """A line on stderr that says how far a run is; only where somebody looks at a terminal."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._on = sys.stderr.isatty()

    def __enter__(self) -> "_Line":
        return self

    def __exit__(self, *_: object) -> None:
        if self._on:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()

    def show(self, share: float) -> None:
        """So much is done."""
        if self._on:
            done = round(30 * share)
            sys.stderr.write(f"\r\x1b[K{self._what}  [{'#' * done}{'.' * (30 - done)}] {share:.0%}")
            sys.stderr.flush()


def _rate(text: str) -> float:
    value = _number(text)
    if not 0 < value <= MOST_TOKENS_PER_S:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most {MOST_TOKENS_PER_S:.0f}")
    return value


def _window(text: str) -> float:
    value = _seconds(text)
    if value < LEAST_MEASURE_S:
        raise argparse.ArgumentTypeError(f"must be at least {LEAST_MEASURE_S:.0f}: less of it says nothing")
    return value


def _seconds(text: str) -> float:
    value = _number(text)
    if not 0 <= value <= MOST_S:
        raise argparse.ArgumentTypeError(f"must be at least 0 and at most {MOST_S:.0f}")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def _whole(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _requests(text: str) -> int:
    count = _whole(text)
    if count > MOST_REQUESTS:
        raise argparse.ArgumentTypeError(f"must be at most {MOST_REQUESTS}")
    return count


def _moment(text: str) -> tuple[NodeId, float]:
    node, at, when = text.rpartition("@")
    if not at or not node:
        raise argparse.ArgumentTypeError(f"{text!r} is not NODE@SECONDS")
    return NodeId(node), _seconds(when)
