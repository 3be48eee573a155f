"""The engine's seam: what the worker asks of one node's engine. Synchronous; one dedicated thread calls it.

An `Engine` holds loaded layers, one KV pool and open sequences. It computes any mix of sequences at different
positions that enter at different layers: at layer l the batch is every work item with `entry <= l < end`.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from helixd.ids import SequenceId
from helixd.layers import LayerRange
from helixd.model.decoder import DType
from helixd.sampling import SamplingParams, TokenLogprobs

if TYPE_CHECKING:  # what stands in for an engine without computing needs no torch
    import torch


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """`kv_token_layers`: hard KV limit in tokens x layers. `threads`: torch threads on a CPU (0: torch's choice)."""

    device: str = "cpu"
    dtype: DType = "float32"
    kv_token_layers: int = 0
    max_context_tokens: int = 4096
    threads: int = 0


@dataclass(frozen=True, slots=True)
class SequenceSpec:
    """A sequence as a stage sees it: it runs `layers` (entry to end) of it.

    `prompt_tokens` is the client's prompt length (fixed over attempts; some rotary scalings depend on it).
    `sampling` only where the sequence leaves the last layer; `prefix` is then prompt + emitted ids known at open,
    of which the first `prompt_tokens` are the prompt (seeds the penalty counts).
    """

    id: SequenceId
    layers: LayerRange
    prompt_tokens: int
    sampling: SamplingParams | None = None
    prefix: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class StageWork:
    """Run positions `[start, start + n)` of an open sequence; n is that of the input.

    Exactly one input: `token_ids` if the sequence enters at layer 0, else `hidden` `[n, hidden_size]`.
    `sample`: (last stage) draw the token that follows the last row. `score`: (last stage) the n ids that follow each
    row, or None where not wanted; their log probabilities are returned.
    """

    sequence: SequenceId
    start: int
    token_ids: tuple[int, ...] | None = None
    hidden: "torch.Tensor | None" = None
    sample: bool = False
    score: tuple[int | None, ...] | None = None


@dataclass(frozen=True, slots=True)
class StageResult:
    """`hidden` `[n, hidden_size]` for the next stage (engine dtype), or at the last stage the drawn token."""

    sequence: SequenceId
    hidden: "torch.Tensor | None" = None
    token: int | None = None
    logprobs: TokenLogprobs | None = None
    scores: tuple[TokenLogprobs | None, ...] | None = None


@dataclass(frozen=True, slots=True)
class LayerTimes:
    """`(tokens, seconds for one layer)` points, rising; a decode batch counts sequences."""

    prompt_layer_time_s: tuple[tuple[float, float], ...]
    decode_layer_time_s: tuple[tuple[float, float], ...]
