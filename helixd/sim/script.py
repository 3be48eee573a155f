"""What happens to a run from outside: nodes that fail and come back, who is told how far it is, what ends it early.

Times are seconds of simulated time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from helixd.errors import HelixError
from helixd.ids import NodeId

DETECTED_S = 3.0
"""How long peers take to notice that one of them is gone."""


class SimulationStopped(HelixError):
    """There is nothing further to simulate. Says why, and what would help."""


@dataclass(frozen=True, slots=True)
class Happening:
    """At `at_s`, `node` dies with all its KV ("fails") or serves again ("joins")."""

    at_s: float
    node: NodeId
    what: Literal["fails", "joins"]


Progress = Callable[[float], None]
"""Told now and then what share of the run is done."""
