"""Pictures of the paper's evaluation, as SVG that stands by itself: a plan's layers and flow, and bars of figures."""

from collections.abc import Mapping, Sequence
from html import escape

_COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2")
_GREY, _OURS, _THEIRS = "#666", "#4269d0", "#c9cdd6"
_LEFT, _WIDTH, _ROW = 92.0, 400.0, 15.0

Node = tuple[str, str, int, int, float]
Bars = Sequence[tuple[str, float, str, bool]]


def placements(title: str, plans: Mapping[str, tuple[int, Sequence[Node], str]]) -> str:
    """Plans side by side. `plans`: name -> (number of layers, nodes, what is said below its name).

    A bar per node over the layers that it holds, the darker the more of the max flow goes through it.
    """
    types = sorted({kind for _, nodes, _ in plans.values() for _, kind, *_ in nodes})
    colour = {kind: _COLOURS[at % len(_COLOURS)] for at, kind in enumerate(types)}
    height = 84 + _ROW * max(len(nodes) for _, nodes, _ in plans.values()) + 30
    parts: list[str] = []
    for at, (name, (layers, nodes, said)) in enumerate(plans.items()):
        left = _LEFT + at * (_LEFT + _WIDTH + 20)
        scale = _WIDTH / layers
        most = max(flow for *_, flow in nodes)
        parts += [_text(left, 44, name, weight="bold"), _text(left, 60, said, fill=_GREY)]
        for layer in range(0, layers + 1, 10):
            x = left + layer * scale
            parts.append(f'<line x1="{x:.0f}" y1="80" x2="{x:.0f}" y2="{height - 28:.0f}" stroke="#eee"/>')
            parts.append(_text(x, 76, str(layer), anchor="middle", fill=_GREY))
        for row, (node, kind, start, end, flow) in enumerate(nodes):
            y = 84 + row * _ROW
            parts.append(_text(left - 6, y + 10, f"{node} {kind}", anchor="end"))
            facts = f"{node} ({kind}): layers [{start}, {end}), {flow:.0f} tokens/s of flow"
            parts.append(
                f'<rect x="{left + start * scale:.1f}" y="{y:.0f}" width="{(end - start) * scale:.1f}" height="12" '
                f'fill="{colour[kind]}" opacity="{0.15 + 0.85 * flow / most:.2f}"><title>{escape(facts)}</title></rect>'
            )
            parts.append(_text(left + end * scale + 4, y + 10, f"{flow:.0f}", fill=_GREY))
    for at, kind in enumerate(types):
        x = _LEFT + at * 90
        parts.append(f'<rect x="{x:.0f}" y="{height - 18:.0f}" width="12" height="12" fill="{colour[kind]}"/>')
        parts.append(_text(x + 16, height - 8, kind))
    return _picture(title, len(plans) * (_LEFT + _WIDTH + 20) + 20, height, parts)


def figures(title: str, groups: Mapping[str, Bars]) -> str:
    """Groups of bars below one another, each scaled for itself: (name, value, what is written, whether it is ours)."""
    left, y, parts = 210.0, 50.0, []
    for name, bars in groups.items():
        parts.append(_text(10, y, name, weight="bold"))
        y += 8
        most = max((value for _, value, _, _ in bars), default=0.0) or 1.0
        for bar, value, said, ours in bars:
            width = _WIDTH * value / most
            fill = _OURS if ours else _THEIRS
            parts.append(_text(left - 8, y + 12, bar, anchor="end"))
            parts.append(f'<rect x="{left:.0f}" y="{y:.0f}" width="{width:.1f}" height="16" fill="{fill}"/>')
            parts.append(_text(left + width + 6, y + 12, said))
            y += 20
        y += 22
    return _picture(title, left + _WIDTH + 160, y, parts)


def _picture(title: str, width: float, height: float, parts: Sequence[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" font-family="sans-serif" '
        'font-size="11">'
    )
    white = '<rect width="100%" height="100%" fill="#fff"/>'
    title_text = _text(10, 20, title, weight="bold", size=14)
    return "\n".join([head, f"<title>{escape(title)}</title>", white, title_text, *parts, "</svg>", ""])


def _text(
    x: float, y: float, text: str, *, anchor: str = "start", fill: str = "#000", weight: str = "normal", size: int = 0
) -> str:
    sized = f' font-size="{size}"' if size else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{fill}" font-weight="{weight}"{sized}>'
        f"{escape(text)}</text>"
    )
