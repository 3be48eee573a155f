"""Traces on disk: what requests ask for, and when they come. CSV with a heading, read whole.

Lengths have columns `input_tokens` and `output_tokens`; with `arrival_s` (seconds, not falling) they are the requests
themselves. Arrival counts have one column `requests`, per interval of 3 s.
"""

import csv
from pathlib import Path

from helixd.commands.cluster_source import read_text
from helixd.commands.failure import CommandFailed
from helixd.exits import Exit
from helixd.sim.job import Request
from helixd.sim.load import Lengths, Trace


def load_lengths(path: Path) -> tuple[Lengths, Trace | None]:
    """The lengths of a trace, and its requests if it tells when they come. Raises CommandFailed."""
    rows, timed = _rows(path, ("input_tokens", "output_tokens"), "arrival_s")
    pairs = [(_whole(path, line, cells[0]), _whole(path, line, cells[1])) for line, cells in rows]
    if not pairs:
        raise CommandFailed(f"{path}: has no requests", Exit.BAD_DATA)
    lengths = Lengths(pairs)
    if not timed:
        return lengths, None
    requests: list[tuple[float, Request]] = []
    for (line, cells), pair in zip(rows, pairs, strict=True):
        at_s = _seconds(path, line, cells[2])
        if requests and at_s < requests[-1][0]:
            raise CommandFailed(f"{path}:{line}: arrival_s: {cells[2]} is before the line above it", Exit.BAD_DATA)
        requests.append((at_s, Request(*pair)))
    return lengths, Trace(tuple(requests), measure_s=requests[-1][0] + 1.0)


def load_counts(path: Path) -> tuple[int, ...]:
    """Requests per interval. Raises CommandFailed."""
    rows, _ = _rows(path, ("requests",), None)
    counts = tuple(_whole(path, line, cells[0], least=0) for line, cells in rows)
    if not sum(counts):
        raise CommandFailed(f"{path}: requests: are all 0", Exit.BAD_DATA)
    return counts


def _rows(path: Path, names: tuple[str, ...], optional: str | None) -> tuple[list[tuple[int, list[str]]], bool]:
    """(line, cells in the order of `names`, then the optional one) of every row; whether the optional one is there."""
    reader = csv.reader(read_text(path).splitlines())
    heading = [name.strip() for name in next(reader, [])]
    for name in names:
        if name not in heading:
            raise CommandFailed(f"{path}:1: has no column {name}; a trace is CSV with a heading", Exit.BAD_DATA)
    wanted = [heading.index(name) for name in names]
    has_optional = optional is not None and optional in heading
    if has_optional:
        wanted.append(heading.index(optional or ""))
    rows: list[tuple[int, list[str]]] = []
    for line, cells in enumerate(reader, 2):
        if not cells:
            continue
        if len(cells) <= max(wanted):
            raise CommandFailed(
                f"{path}:{line}: has {len(cells)} columns, the heading has {len(heading)}", Exit.BAD_DATA
            )
        rows.append((line, [cells[at] for at in wanted]))
    return rows, has_optional


def _whole(path: Path, line: int, text: str, *, least: int = 1) -> int:
    try:
        value = int(text)
    except ValueError:
        raise CommandFailed(f"{path}:{line}: {text!r} is not a whole number", Exit.BAD_DATA) from None
    if value < least:
        raise CommandFailed(f"{path}:{line}: {value} is below {least}", Exit.BAD_DATA)
    return value


def _seconds(path: Path, line: int, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise CommandFailed(f"{path}:{line}: {text!r} is not a number of seconds", Exit.BAD_DATA) from None
    if not 0 <= value < float("inf"):
        raise CommandFailed(f"{path}:{line}: {text} is not a time from the start", Exit.BAD_DATA)
    return value
