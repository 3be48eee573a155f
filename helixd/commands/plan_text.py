"""A report as text for people: what the plan is worth, one line per node, and the tables that were asked for."""

import math

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from helixd.commands.plan_report import NodeRow, PlanRow, Report
from helixd.plan.adopt import gain
from helixd.plan.baselines import BASELINES
from helixd.plan.cluster.spec import COORDINATOR
from helixd.plan.predict import Prediction
from helixd.plan.undominated import FrontierPoint

_SHOWN_HOPS = 3
_PROVEN = 1e-6


def show(console: Console, found: Report) -> None:
    """Print the report."""
    console.print(_summary(found), highlight=False, soft_wrap=True)
    console.print(_nodes(found))
    for note in _footnotes(found):
        console.print(note, highlight=False, soft_wrap=True)
    if found.moving is not None and len(found.moving.options) > 1:
        console.print(_ways_on(found))
    if found.frontier:
        console.print(_frontier(found.frontier))
    if found.compared:
        console.print(_compared(found.compared))


def _summary(found: Report) -> RenderableType:
    plan, spec = found.plan, found.spec
    lines = [
        Text.assemble(
            (spec.name, "bold"),
            f": {spec.model.name}, {plan.num_layers} layers, {size(found.weight_bytes)} of weights, on "
            f"{sum(row.flow_tokens_per_s > 0 for row in found.rows)} of {len(found.rows)} nodes",
        ),
        _line(
            "max flow", f"{figure(plan.max_flow_tokens_per_s)} tokens/s, prompts and output together; {_bound(found)}"
        ),
    ]
    if found.prediction is not None:
        predicted = found.prediction
        lines += [
            _line(
                "whole cluster",
                f"{figure(predicted.decode_tokens_per_s)} output tokens/s predicted, with "
                f"{predicted.in_flight:.0f} requests in flight",
            ),
            _line(
                "one request", f"{_rate(predicted)} tokens/s while it is alone; {_loaded(predicted)} under full load"
            ),
        ]
    lines.append(_line("depth", f"a token crosses {found.stages:.1f} nodes; {_survival(found)}"))
    if found.unconstrained is not None:
        lines.append(_line("its price", _price(found)))
    if found.alone is not None and len(plan.placement) > 1:
        node, alone = found.alone
        lines.append(
            _line(
                "alone", f"{node} by itself: {figure(alone.decode_tokens_per_s)} tokens/s, one request {_rate(alone)}"
            )
        )
    if found.in_force is not None:
        lines.append(_line("as it is", _as_it_is(found)))
    if found.load_bytes is not None:
        moved = [row for row in found.rows if row.load_bytes]
        text = (
            f"{len(moved)} node{'s load' if len(moved) > 1 else ' loads'} {size(found.load_bytes)}{_loading(found)}"
            if moved
            else "nothing: every node keeps what it holds"
        )
        lines.append(_line("to load", text))
    chosen = f"; serves most of {plan.simulated_plans} that were simulated" if plan.simulated_plans else ""
    lines.append(_line("search", f"{plan.solve_s:.1f} s, {plan.method}{chosen}"))
    if found.cut_off is not None:
        lines.append(_line("broken off", f"{found.cut_off}; this is the best found until then", style="yellow"))
    return Group(*lines)


def _line(name: str, text: str, *, style: str = "") -> Text:
    return Text.assemble((f"  {name:14}", "dim"), (text, style))


def _bound(found: Report) -> str:
    gap = found.gap
    if gap is None:
        return "no bound was computed"
    if gap <= _PROVEN:
        return "no placement of this cluster has more"
    return f"no placement has more than {figure(found.plan.upper_bound_tokens_per_s)}: within {gap:.1%} of it"


def _survival(found: Report) -> str:
    return (
        "any one node may be lost"
        if found.survives
        else "if one node is lost, there may be no pipeline until a new plan"
    )


def _price(found: Report) -> str:
    free, plan = found.unconstrained, found.plan
    assert free is not None
    text = f"without it {figure(free.max_flow_tokens_per_s)} tokens/s of flow"
    lost = f"{1 - plan.max_flow_tokens_per_s / free.max_flow_tokens_per_s:.0%} of the flow"
    if free.predicted_decode_tokens_per_s and plan.predicted_decode_tokens_per_s is not None:
        text += f" and {figure(free.predicted_decode_tokens_per_s)} output tokens/s"
        lost += f", {1 - plan.predicted_decode_tokens_per_s / free.predicted_decode_tokens_per_s:.0%} of the output"
    return f"{text}: it costs {lost}"


def _as_it_is(found: Report) -> str:
    now = found.in_force
    assert now is not None
    served = now.predicted_decode_tokens_per_s
    text = f"{figure(now.max_flow_tokens_per_s)} tokens/s of flow"
    text += f", {figure(served)} output tokens/s" if served is not None else ""
    return f"{text}; this plan is {gain(now, found.plan)}"


def _nodes(found: Report) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for title in ("node", "type", "layers"):
        table.add_column(title, no_wrap=True)
    for title in ("weights", "KV tokens", "T tokens/s", "flow", "share", "busy"):
        table.add_column(title, justify="right", no_wrap=True)
    if found.load_bytes is not None:
        table.add_column("to load", justify="right", no_wrap=True)
    table.add_column("next")
    table.add_column("note", ratio=1)
    for row in sorted(found.rows, key=by_range):
        cells = [row.id, ("~" if row.estimated else "") + row.type]
        if row.held is None:
            cells += ["-"] * 7
        else:
            cells += [
                f"[{row.held.start}, {row.held.end})",
                size(row.weight_bytes or 0.0),
                f"{row.kv_tokens:.0f}",
                figure(row.throughput_tokens_per_s),
                figure(row.flow_tokens_per_s),
                f"{row.share:.0%}",
                f"{row.busy:.0%}",
            ]
        if found.load_bytes is not None:
            cells.append(size(row.load_bytes) if row.load_bytes else "-")
        cells += [_hops(row), row.note]
        idle = row.flow_tokens_per_s <= 0
        table.add_row(*map(Text, cells), style="dim" if idle else "")
    return table


def by_range(row: NodeRow) -> tuple[bool, tuple[int, ...], str]:
    """Key to sort rows in the order of layers; nodes that hold nothing come last."""
    return row.held is None, row.held.to_pair() if row.held else (), row.id


def _hops(row: NodeRow) -> str:
    texts = []
    for hop in row.next_hops[:_SHOWN_HOPS]:
        name = "out" if hop.node == COORDINATOR else hop.node
        share = "" if len(row.next_hops) == 1 else f" {hop.flow_tokens_per_s / row.flow_tokens_per_s:.0%}"
        texts.append(f"{name}{share}" + (" (link full)" if hop.full > 0.999 else ""))
    more = len(row.next_hops) - _SHOWN_HOPS
    return ", ".join(texts) + (f", {more} more" if more > 0 else "")


def _footnotes(found: Report) -> list[str]:
    notes = []
    if any(row.estimated for row in found.rows):
        notes.append(
            "~ estimated from the vendor's datasheet, not measured: off by a fifth at the middle, "
            "by a factor of two at worst"
        )
    if found.prediction is None:
        notes.append("no prediction of output tokens/s: the file has no layer times for some node in use")
    return notes


def _loading(found: Report) -> str:
    return f", {found.moving.load_s:.0f} s until all of it serves" if found.moving is not None else ""


def _ways_on(found: Report) -> Table:
    assert found.moving is not None
    table = Table(
        title="ways on from what nodes hold", title_justify="left", title_style="bold", box=None, pad_edge=False,
        padding=(0, 2, 0, 0), header_style="bold",
    )  # fmt: skip
    for title in ("to load", "seconds", "max flow", "worth", "worth while loading"):
        table.add_column(title, justify="right")
    table.add_column("")
    for option in found.moving.options:
        table.add_row(
            size(option.load_bytes), f"{option.load_s:.0f}", figure(option.flow_tokens_per_s), figure(option.worth),
            figure(option.worth_while_loading), "chosen" if option.placement == found.plan.placement else "",
        )  # fmt: skip
    return table


def _frontier(points: tuple[FrontierPoint, ...]) -> Table:
    table = Table(
        title="flow against depth", title_justify="left", title_style="bold", box=None, pad_edge=False,
        padding=(0, 2, 0, 0), header_style="bold",
    )  # fmt: skip
    for title in ("stages", "max flow", "output tokens/s", "one request", "nodes"):
        table.add_column(title, justify="right")
    table.add_column("one node lost")
    for point in points:
        predicted = point.predicted_decode_tokens_per_s
        alone = point.unloaded_round_s
        table.add_row(
            f"{point.stages:.1f}",
            figure(point.max_flow_tokens_per_s),
            figure(predicted),
            figure(1 / alone if alone else None),
            str(point.nodes),
            "goes on" if point.survives else "stops",
        )
    return table


def _compared(rows: tuple[PlanRow, ...]) -> Table:
    table = Table(
        title="other rules on this cluster", title_justify="left", title_style="bold", box=None, pad_edge=False,
        padding=(0, 2, 0, 0), header_style="bold",
    )  # fmt: skip
    table.add_column("rule", no_wrap=True)
    for title in ("max flow", "of helixd's", "output tokens/s", "of helixd's", "stages", "nodes", "s"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("about", ratio=1)
    best = rows[0].plan
    assert best is not None
    for row in rows:
        about = BASELINES[row.name].about if row.name in BASELINES else "this plan"
        if row.plan is None:
            table.add_row(row.name, *["-"] * 7, Text(f"{about}: {row.reason}"), style="dim")
            continue
        decode, best_decode = row.plan.predicted_decode_tokens_per_s, best.predicted_decode_tokens_per_s
        table.add_row(
            row.name,
            figure(row.plan.max_flow_tokens_per_s),
            f"{row.plan.max_flow_tokens_per_s / best.max_flow_tokens_per_s:.0%}",
            figure(decode),
            f"{decode / best_decode:.0%}" if decode is not None and best_decode else "-",
            f"{row.stages:.1f}",
            str(len(row.plan.placement)),
            f"{row.plan.solve_s:.1f}",
            about,
        )
    return table


def _rate(found: Prediction) -> str:
    return figure(1 / found.unloaded_round_s) if 0 < found.unloaded_round_s < math.inf else "-"


def _loaded(found: Prediction) -> str:
    return figure(1 / found.round_s) if 0 < found.round_s < math.inf else "-"


def figure(value: float | None) -> str:
    """A rate with as many digits as anybody reads."""
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def size(size_bytes: float) -> str:
    """Bytes in GB, as memory is sold."""
    return f"{size_bytes / 1e9:.1f} GB" if size_bytes >= 1e8 else f"{size_bytes / 1e6:.1f} MB"
