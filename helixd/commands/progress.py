"""A line on stderr that says what is searched for and how far it is; only where somebody looks at a terminal."""

from types import TracebackType
from typing import Self, TextIO

from helixd.commands.plan_text import figure
from helixd.solver.job import Doing


class Progress:
    """Rewrites one line of `out` until the block ends, which clears it. Writes nothing if `out` is no terminal."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._on = out.isatty()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._write("")

    def show(self, doing: Doing) -> None:
        """Say how far the search is."""
        text = f"{doing.elapsed_s:5.1f} s  {doing.what}"
        if doing.flow_tokens_per_s is not None:
            text += f": flow {figure(doing.flow_tokens_per_s)}"
            if doing.bound_tokens_per_s:
                gap = max(0.0, 1 - doing.flow_tokens_per_s / doing.bound_tokens_per_s)
                text += f" of at most {figure(doing.bound_tokens_per_s)} tokens/s, gap {gap:.1%}"
            text += f" ({doing.method})" if doing.method else ""
        self._write(text)

    def _write(self, text: str) -> None:
        if self._on:
            self._out.write(f"\r\x1b[K{text}")
            self._out.flush()
