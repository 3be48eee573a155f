"""What a node's loop asks of its device in one step, and what comes of it. No tensors: rows are bytes."""

from dataclasses import dataclass, field

from helixd.engine.types import SequenceSpec
from helixd.ids import SequenceId
from helixd.sampling import TokenLogprobs
from helixd.worker.batcher import Pass


@dataclass(frozen=True, slots=True)
class ScoredPass:
    """A pass with the ids whose log probabilities are wanted (None: none are)."""

    item: Pass
    score: tuple[int | None, ...] | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """What the thread does next, in this order. `groups[i]` is the next hop of `passes[i]` ("" for none)."""

    closes: tuple[SequenceId, ...]
    opens: tuple[SequenceSpec, ...]
    passes: tuple[ScoredPass, ...]
    groups: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class DrawnToken:
    """A token drawn by a pass."""

    item: Pass
    token: int
    logprobs: TokenLogprobs | None


@dataclass(slots=True)
class StepOutcome:
    """What came of a step. `rows`: next hop, the passes that go there, and their rows as one buffer.

    `failed`: passes that could not be computed, each with the reason. `layers_s`: seconds that the layers took, 0 where
    that is not known.
    """

    rows: list[tuple[str, list[Pass], memoryview]] = field(default_factory=list)
    drawn: list[DrawnToken] = field(default_factory=list)
    scored: list[tuple[Pass, tuple[TokenLogprobs | None, ...]]] = field(default_factory=list)
    out_of_kv: list[Pass] = field(default_factory=list)
    failed: list[tuple[Pass, str]] = field(default_factory=list)
    layers_s: float = 0.0
