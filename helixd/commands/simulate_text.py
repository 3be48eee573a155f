"""A simulated run for people: the figures, the plans side by side, the nodes."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from helixd.commands.plan_text import figure
from helixd.commands.simulate_report import Simulated
from helixd.sim.load import Offline, Online
from helixd.sim.meter import NodeReport, Quantiles

_BUSY = 0.9


def show(console: Console, found: list[Simulated]) -> None:
    """Print it."""
    first = found[0]
    report = first.report
    console.print(Text.assemble((f"{first.spec.name}", "bold"), f": {_load(first)}, policy {report.policy}"))
    served = f"{figure(report.decode_tokens_per_s)} output tokens/s, {figure(report.total_tokens_per_s)} with prompts"
    flow = f"; max flow {figure(first.plan.max_flow_tokens_per_s)}"
    _line(console, "served", served + flow)
    _line(console, "first token", _waits(report.ttft_s))
    _line(console, "next token", _waits(report.tpot_s))
    _line(console, "whole answer", _waits(report.e2e_s))
    counts = f"{report.started} requests started, {report.finished} finished in the window"
    for count, what in (
        (report.dropped, "dropped"), (report.preempted, "preempted"), (report.recovered, "recovered")
    ):  # fmt: skip
        counts += f", {count} {what}" if count else ""
    running = f"; {report.mean_in_flight:.0f} running and {report.mean_waiting:.1f} waiting on average"
    _line(console, "requests", counts + running)
    if report.round_s:
        spent = ", ".join(f"{1000 * seconds:.0f} ms {what}" for what, seconds in report.round_s.items())
        _line(console, "a next token", spent)
    if len(found) > 1:
        console.print()
        console.print(_plans(found))
    for name, why in first.impossible.items():
        console.print(f"  {name}: no plan: {why}", style="dim")
    console.print()
    console.print(_nodes(first))


def _load(found: Simulated) -> str:
    load = found.load
    window = f"{found.report.window_s:.0f} s measured"
    if isinstance(load, Offline):
        kept = f"{load.in_flight} requests kept running" if load.in_flight is not None else "as much work as fits"
        return f"{kept}, {window}"
    if isinstance(load, Online):
        return f"{figure(load.tokens_per_s)} tokens/s arrive, {window}"
    return f"{len(load.requests)} requests of a trace, {window}"


def _line(console: Console, name: str, text: str) -> None:
    console.print(Text.assemble((f"  {name:14}", "dim"), text))


def _waits(seen: Quantiles) -> str:
    if not seen.count:
        return "-"
    return f"{_s(seen.p50)} median, {_s(seen.p95)} p95, {_s(seen.p99)} p99, {_s(seen.mean)} mean"


def _s(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 10 else f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"


def _plans(found: list[Simulated]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("plan", no_wrap=True)
    for title in ("max flow", "output tokens/s", "of the first", "first token", "next token", "dropped"):
        table.add_column(title, justify="right", no_wrap=True)
    base = found[0].report.decode_tokens_per_s
    for each in found:
        report = each.report
        table.add_row(
            each.name,
            figure(each.plan.max_flow_tokens_per_s),
            figure(report.decode_tokens_per_s),
            f"{report.decode_tokens_per_s / base:.0%}" if base else "-",
            _s(report.ttft_s.p50) if report.ttft_s.count else "-",
            _s(report.tpot_s.p50) if report.tpot_s.count else "-",
            str(report.dropped),
        )
    return table


def _nodes(found: Simulated) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for title in ("node", "type", "layers"):
        table.add_column(title, no_wrap=True)
    for title in ("busy", "with prompts", "decodes per batch", "KV mean", "KV peak"):
        table.add_column(title, justify="right", no_wrap=True)
    types = {node.id: node.profile.type for node in found.spec.nodes}
    placement = found.plan.placement
    for node, seen in sorted(found.report.nodes.items(), key=lambda item: (placement[item[0]].to_pair(), item[0])):
        table.add_row(
            node, types[node], str(placement[node]), f"{seen.busy:.0%}", f"{seen.prompt:.0%}",
            f"{seen.mean_decodes:.1f}", f"{seen.kv_mean:.0%}", f"{seen.kv_peak:.0%}", style=_style(seen),
        )  # fmt: skip
    return table


def _style(seen: NodeReport) -> str:
    return "dim" if not seen.batches else "yellow" if seen.busy > _BUSY else ""
