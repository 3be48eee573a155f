"""Jinja's immutable sandbox with a meter: a template may do so many steps, take so long and make values so large.

Jinja's own sandbox keeps templates from the interpreter, not from its time. Steps are what a template's work can grow
by: rounds of its loops, calls, arithmetic. What is not metered is Jinja's filters and the joining of strings with `~`,
whose work is in proportion to the values they are given: a template made for nothing else can still fill the memory.
"""

import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_STEPS = 1_000_000
MAX_SECONDS = 5.0
MAX_LENGTH = 8 * 2**20
MAX_BITS = 4096
_ROUNDS = "helixd_rounds"
_WIDE = re.compile(r"%[^%a-zA-Z]*(?:\d{4,}|\*)")


class OverBudget(TemplateError):
    """The template has done more than it may."""


class Meter:
    """One rendering's budget."""

    def __init__(self, steps: int, seconds: float, clock: Callable[[], float]) -> None:
        self._left = steps
        self._steps = steps
        self._seconds = seconds
        self._clock = clock
        self._until_s = clock() + seconds

    def step(self) -> None:
        """One more. Raises OverBudget."""
        self._left -= 1
        if self._left < 0:
            raise OverBudget(f"it takes more than {self._steps} steps")
        if self._clock() >= self._until_s:
            raise OverBudget(f"it takes more than {self._seconds:g} s")


_meter: ContextVar[Meter] = ContextVar("helixd.model.sandbox.meter")


@contextmanager
def metered(steps: int, seconds: float, clock: Callable[[], float] = time.monotonic) -> Iterator[Meter]:
    """What templates do inside the block, in this thread, is on one meter."""
    meter = Meter(steps, seconds, clock)
    token = _meter.set(meter)
    try:
        yield meter
    finally:
        _meter.reset(token)


class MeteredSandbox(ImmutableSandboxedEnvironment):
    """An environment whose templates are rendered inside `metered`."""

    intercepted_binops = frozenset({"*", "**", "%", "+"})

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.filters[_ROUNDS] = _rounds

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template = super()._parse(source, name, filename)
        _CountRounds().visit(template)
        return template

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 - as Jinja has it
        """A function, method or macro."""
        _step()
        if any(type(value) is int and abs(value) > MAX_LENGTH for value in (*args, *kwargs.values())):
            raise OverBudget(f"a number given to a call is above {MAX_LENGTH}")
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Arithmetic that can make much of little."""
        _step()
        _check_size(operator, left, right)
        return super().call_binop(context, operator, left, right)


class _CountRounds(NodeTransformer):
    def visit_For(self, node: nodes.For) -> nodes.For:  # noqa: N802 - as Jinja has it
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, _ROUNDS, [], [], None, None, lineno=node.lineno)
        return node


def _rounds(values: Iterable[object]) -> Iterator[object]:
    for value in values:
        _step()
        yield value


def _step() -> None:
    meter = _meter.get(None)
    # Outside of a rendering Jinja evaluates constants of the template, which it gives up on when they fail.
    if meter is not None:
        meter.step()


def _check_size(operator: str, left: Any, right: Any) -> None:
    if operator == "%":
        if isinstance(left, str) and _WIDE.search(left):
            raise OverBudget("a field is wider than 999 characters")
        return
    sized = [value for value in (left, right) if isinstance(value, str | bytes | list | tuple)]
    numbers = [value for value in (left, right) if isinstance(value, int)]
    if operator == "+":
        length, bits = sum(map(len, sized)), 0
    elif operator == "*":
        length = len(sized[0]) * max(0, *numbers, 0) if sized else 0
        bits = sum(number.bit_length() for number in numbers)
    else:
        length, bits = 0, left.bit_length() * max(0, right) if len(numbers) == 2 else 0
    if length > MAX_LENGTH or bits > MAX_BITS:
        raise OverBudget("a value is too large")
