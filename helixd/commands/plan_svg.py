"""A plan as a picture: layers from left to right, a bar per node over the layers it holds, flow as width.

Between bars, a line drops where one node hands over to the next, at the layer it goes on with. Stands by itself:
no script, no font, no reference to anything outside.
"""

from html import escape

from helixd.commands.plan_report import NodeRow, Report
from helixd.commands.plan_text import by_range, figure, size
from helixd.ids import NodeId
from helixd.plan.cluster.spec import COORDINATOR

_LEFT, _RIGHT, _TOP, _ROW, _BAR, _WIDTH = 190.0, 150.0, 64.0, 26.0, 18.0, 900.0
_COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5", "#9c6b4e")


def plan_svg(found: Report) -> str:
    """The picture as SVG text."""
    rows = sorted((row for row in found.rows if row.held), key=by_range)
    idle = [row for row in found.rows if not row.held]
    types = sorted({row.type for row in found.rows})
    colour = {name: _COLOURS[at % len(_COLOURS)] for at, name in enumerate(types)}
    at = {row.id: _TOP + number * _ROW for number, row in enumerate(rows)}
    height = _TOP + _ROW * len(rows) + 40 + (22 if idle else 0)
    scale = _WIDTH / found.plan.num_layers
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_LEFT + _WIDTH + _RIGHT:.0f} {height:.0f}" '
        'font-family="sans-serif" font-size="12">',
        f"<title>{escape(found.spec.name)}</title>",
        '<rect width="100%" height="100%" fill="#fff"/>',
        _text(10, 20, _heading(found), weight="bold"),
    ]
    parts += _axis(found.plan.num_layers, scale, height - (62 if idle else 40))
    parts += _links(found, rows, at, scale)
    for row in rows:
        parts += _bar(row, at[row.id], scale, colour[row.type])
    parts += _legend(types, colour, height - (34 if idle else 12))
    if idle:
        names = ", ".join(row.id for row in idle)
        parts.append(_text(10, height - 10, f"idle: {names}", fill="#666"))
    return "\n".join([*parts, "</svg>", ""])


def _heading(found: Report) -> str:
    plan = found.plan
    bound = f" of at most {figure(plan.upper_bound_tokens_per_s)}" if plan.upper_bound_tokens_per_s else ""
    text = f"{found.spec.name}: {found.spec.model.name}, max flow {figure(plan.max_flow_tokens_per_s)}{bound} tokens/s"
    predicted = plan.predicted_decode_tokens_per_s
    return text + (f", {figure(predicted)} output tokens/s predicted" if predicted is not None else "")


def _axis(num_layers: int, scale: float, bottom: float) -> list[str]:
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if num_layers / s <= 20)
    parts = []
    for layer in range(0, num_layers + 1, step):
        x = _LEFT + layer * scale
        parts.append(f'<line x1="{x:.1f}" y1="{_TOP - 10:.0f}" x2="{x:.1f}" y2="{bottom:.0f}" stroke="#eee"/>')
        parts.append(_text(x, _TOP - 16, str(layer), anchor="middle", fill="#666"))
    parts.append(_text(_LEFT - 8, _TOP - 16, "layer", anchor="end", fill="#666"))
    return parts


def _bar(row: NodeRow, y: float, scale: float, colour: str) -> list[str]:
    assert row.held is not None
    x, width = _LEFT + row.held.start * scale, len(row.held) * scale
    thick = max(1.0, _BAR * row.share) if row.flow_tokens_per_s > 0 else 0.0
    held = f"{row.id} ({_type(row)}) holds {row.held}, {size(row.weight_bytes or 0.0)}"
    carries = f"carries {figure(row.flow_tokens_per_s)} of {figure(row.throughput_tokens_per_s)} tokens/s"
    facts = f"{held}; {carries}" + (f"; {row.note}" if row.note else "")
    return [
        f"<g><title>{escape(facts)}</title>",
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{_BAR}" fill="{colour}" fill-opacity="0.2" '
        f'stroke="{colour}"/>',
        f'<rect x="{x:.1f}" y="{y + (_BAR - thick) / 2:.1f}" width="{width:.1f}" height="{thick:.1f}" '
        f'fill="{colour}"/>',
        "</g>",
        _text(_LEFT - 8, y + 13, f"{row.id}  {_type(row)}", anchor="end"),
        _text(_LEFT + _WIDTH + 10, y + 13, f"{figure(row.flow_tokens_per_s)} tokens/s, {row.busy:.0%}", fill="#444"),
    ]


def _type(row: NodeRow) -> str:
    return ("~" if row.estimated else "") + row.type


def _links(found: Report, rows: list[NodeRow], at: dict[NodeId, float], scale: float) -> list[str]:
    parts = []
    for row in rows:
        assert row.held is not None
        for hop in row.next_hops:
            if hop.node == COORDINATOR:
                continue
            x, y1, y2 = _LEFT + row.held.end * scale, at[row.id] + _BAR / 2, at[hop.node] + _BAR / 2
            thick = max(0.6, _BAR * hop.flow_tokens_per_s / found.plan.max_flow_tokens_per_s)
            bend = min(24.0, 4 + abs(y2 - y1) / 12)
            facts = f"{row.id} to {hop.node}: {figure(hop.flow_tokens_per_s)} tokens/s, link {hop.full:.0%} full"
            parts.append(
                f'<path d="M {x:.1f} {y1:.1f} C {x + bend:.1f} {y1:.1f}, {x - bend:.1f} {y2:.1f}, {x:.1f} {y2:.1f}" '
                f'fill="none" stroke="#888" stroke-opacity="0.45" stroke-width="{thick:.1f}">'
                f"<title>{escape(facts)}</title></path>"
            )
    return parts


def _legend(types: list[str], colour: dict[str, str], y: float) -> list[str]:
    parts, x = [], 10.0
    for name in types:
        parts.append(f'<rect x="{x:.0f}" y="{y - 10:.0f}" width="12" height="12" fill="{colour[name]}"/>')
        parts.append(_text(x + 17, y, name))
        x += 34 + 7.5 * len(name)
    return parts


def _text(x: float, y: float, text: str, *, anchor: str = "start", fill: str = "#000", weight: str = "normal") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{fill}" font-weight="{weight}">'
        f"{escape(text)}</text>"
    )
