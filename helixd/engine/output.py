"""What leaves the last layer: logits, drawn tokens, scores of given tokens. The engine's end, without its state."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from helixd.engine.linear import Linear
from helixd.engine.norm import RmsNorm
from helixd.engine.sampling import SamplerState, sample, token_logprobs
from helixd.sampling import TokenLogprobs

# Rows of logits that are scored at a time, so that scoring a long prompt does not take prompt x vocabulary floats.
SCORE_ROWS = 64


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """`final_norm`, then `linear` to the vocabulary, capped at `softcap` where there is one."""

    final_norm: RmsNorm
    linear: Linear
    softcap: float | None

    def logits(self, hidden: Tensor) -> Tensor:
        """`[n, hidden_size]` to float32 `[n, vocab]`."""
        logits = self.linear(self.final_norm(hidden)).float()
        return logits if self.softcap is None else torch.tanh(logits / self.softcap).mul_(self.softcap)


@dataclass(frozen=True, slots=True, eq=False)
class Draw:
    """The token at `position` is to be drawn from the hidden state in `row`."""

    row: int
    position: int
    sampler: SamplerState


@dataclass(frozen=True, slots=True)
class Drawn:
    """A drawn token and, where its parameters ask for them, its log probabilities."""

    token: int
    logprobs: TokenLogprobs | None


def draw_tokens(head: Head, hidden: Tensor, draws: Sequence[Draw]) -> list[Drawn]:
    """Draw every one of `draws` from the step's `hidden [n, hidden_size]`, and record it in its sampler."""
    if not draws:
        return []
    logits = head.logits(hidden[torch.tensor([draw.row for draw in draws], device=hidden.device)])
    tokens = sample(logits, [draw.sampler for draw in draws], [draw.position for draw in draws])
    reported = [at for at, draw in enumerate(draws) if draw.sampler.params.logprobs is not None]
    logprobs: dict[int, TokenLogprobs] = {}
    if reported:
        rows = logits if len(reported) == len(draws) else logits[torch.tensor(reported, device=logits.device)]
        tops = [draws[at].sampler.params.logprobs or 0 for at in reported]
        logprobs = dict(zip(reported, token_logprobs(rows, [tokens[at] for at in reported], tops), strict=True))
    return [Drawn(token, logprobs.get(at)) for at, token in enumerate(tokens)]


def score_tokens(
    head: Head, hidden: Tensor, tokens: Sequence[int | None], top: int
) -> tuple[TokenLogprobs | None, ...]:
    """Log probability of `tokens[i]`, and the `top` best, after row i of `hidden [n, hidden_size]`; None for None."""
    wanted = [(row, token) for row, token in enumerate(tokens) if token is not None]
    scores: list[TokenLogprobs | None] = [None] * len(tokens)
    for at in range(0, len(wanted), SCORE_ROWS):
        part = wanted[at : at + SCORE_ROWS]
        logits = head.logits(hidden[torch.tensor([row for row, _ in part], device=hidden.device)])
        found = token_logprobs(logits, [token for _, token in part], [top] * len(part))
        for (row, _), logprob in zip(part, found, strict=True):
            scores[row] = logprob
    return tuple(scores)
