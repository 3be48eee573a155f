"""A simulated run as a picture: a bar per plan for what it serves, a bar per node for what it does and keeps.

Stands by itself: no script, no font, no reference to anything outside.
"""

from html import escape

from helixd.commands.plan_text import figure
from helixd.commands.simulate_report import Simulated

_LEFT, _WIDTH, _RIGHT, _TOP, _ROW, _BAR = 200.0, 620.0, 260.0, 62.0, 24.0, 16.0
_PROMPT, _DECODE, _KV, _GREY = "#4269d0", "#97bbf5", "#ff725c", "#666"


def simulate_svg(found: list[Simulated]) -> str:
    """The picture as SVG text."""
    first = found[0]
    placement = first.plan.placement
    nodes = sorted(first.report.nodes.items(), key=lambda item: (placement[item[0]].to_pair(), item[0]))
    below = _TOP + _ROW * len(found) + 50
    height = below + _ROW * len(nodes) + 40
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_LEFT + _WIDTH + _RIGHT:.0f} {height:.0f}" '
        'font-family="sans-serif" font-size="12">',
        f"<title>{escape(first.spec.name)}</title>",
        '<rect width="100%" height="100%" fill="#fff"/>',
        _text(10, 20, f"{first.spec.name}: {first.report.policy}, {first.report.window_s:.0f} s", weight="bold"),
        _text(_LEFT, _TOP - 16, "output tokens/s", fill=_GREY),
        _text(_LEFT + _WIDTH + 10, _TOP - 16, "first token, next token (median)", fill=_GREY),
    ]
    most = max(each.report.decode_tokens_per_s for each in found) or 1.0
    for row, each in enumerate(found):
        y = _TOP + row * _ROW
        report = each.report
        parts += [
            _text(_LEFT - 8, y + 12, each.name, anchor="end"),
            _bar(_LEFT, y, _WIDTH * report.decode_tokens_per_s / most, _DECODE, f"{each.name}: decode tokens/s"),
            _text(_LEFT + 6, y + 12, figure(report.decode_tokens_per_s)),
            _text(_LEFT + _WIDTH + 10, y + 12, f"{report.ttft_s.p50:.2f} s, {report.tpot_s.p50:.3f} s", fill="#444"),
        ]
    parts.append(_text(_LEFT, below - 12, "time busy: with prompts, with decode; KV mean (line: peak)", fill=_GREY))
    types = {node.id: node.profile.type for node in first.spec.nodes}
    for row, (node, seen) in enumerate(nodes):
        y = below + row * _ROW
        decode = max(0.0, seen.busy - seen.prompt)
        facts = f"{node} ({types[node]}) holds {placement[node]}: busy {seen.busy:.0%}, KV {seen.kv_mean:.0%}"
        peak = _LEFT + _WIDTH * min(1.0, seen.kv_peak)
        parts += [
            _text(_LEFT - 8, y + 12, f"{node}  {types[node]}  {placement[node]}", anchor="end"),
            _bar(_LEFT, y, _WIDTH, "#f3f3f3", facts),
            _bar(_LEFT, y, _WIDTH * seen.prompt, _PROMPT, facts, thick=10),
            _bar(_LEFT + _WIDTH * seen.prompt, y, _WIDTH * decode, _DECODE, facts, thick=10),
            _bar(_LEFT, y + 11, _WIDTH * min(1.0, seen.kv_mean), _KV, facts, thick=4),
            f'<line x1="{peak:.1f}" y1="{y + 10:.1f}" x2="{peak:.1f}" y2="{y + 16:.1f}" stroke="{_KV}"/>',
            _text(
                _LEFT + _WIDTH + 10, y + 12,
                f"{seen.busy:.0%} busy, {seen.mean_decodes:.1f} decodes per batch, KV {seen.kv_mean:.0%}", fill="#444",
            ),
        ]  # fmt: skip
    return "\n".join([*parts, "</svg>", ""])


def _bar(x: float, y: float, width: float, colour: str, facts: str, *, thick: float = _BAR) -> str:
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(0.0, width):.1f}" height="{thick:.0f}" fill="{colour}">'
        f"<title>{escape(facts)}</title></rect>"
    )


def _text(x: float, y: float, text: str, *, anchor: str = "start", fill: str = "#000", weight: str = "normal") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{fill}" font-weight="{weight}">'
        f"{escape(text)}</text>"
    )
