"""Scripted events of a run: nodes that fail and nodes that come back. Times are seconds of simulated time."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from helixd.ids import NodeId

DETECTED_S = 3.0
"""How long peers take to notice that one of them is gone."""


@dataclass(frozen=True, slots=True)
class Happening:
    """At `at_s`, `node` dies with all its KV ("fails") or serves again ("joins")."""

    at_s: float
    node: NodeId
    what: Literal["fails", "joins"]


Progress = Callable[[float], None]
"""Told now and then what share of the run is done."""
