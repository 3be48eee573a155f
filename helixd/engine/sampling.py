"""Drawing tokens: penalties and bias on the logits, filters, one counter-based number per position.

Order: repetition, presence and frequency penalties, logit bias, temperature, then top_k, top_p (over what top_k left)
and min_p. The draw inverts the cumulative distribution in vocabulary order, in float64, so that rounding that
differs between machines moves the outcome only where the number falls on a boundary. Log probabilities reported are
the model's own (before any of this), in float32. Knows nothing of layers or KV.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from helixd.engine.philox import uniform
from helixd.sampling import SamplingParams, TokenLogprobs

# Alternatives looked at first for top_p: sorting a whole vocabulary costs more than everything else here.
_NUCLEUS_TOKENS = 256
# torch's argmax is not vectorised on a CPU, its amax is.
_BLOCK = 64


class SamplerState:
    """What the penalties of one sequence need: prompt + output ids, and how often the output has each.

    Only kept where the parameters have a penalty. A position may be drawn again: the ids from it on are forgotten.
    """

    def __init__(self, params: SamplingParams, prompt_tokens: int, prefix: Sequence[int]) -> None:
        self.params = params
        self._counts = params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
        self._repetition = params.repetition_penalty != 1.0
        self._tracked = self._counts or self._repetition
        self._prompt_tokens = prompt_tokens
        self._ids = list(prefix) if self._tracked else []
        self._seen: Counter[int] = Counter(self._ids if self._repetition else ())
        self._output: Counter[int] = Counter(self._ids[prompt_tokens:] if self._counts else ())

    def check(self, position: int) -> None:
        """Raises ValueError where a token at `position` cannot be drawn, for penalties need the ids before it."""
        if self._tracked and position > len(self._ids):
            raise ValueError(f"penalties need the ids before position {position}, only {len(self._ids)} are known")

    def rewind(self, position: int) -> None:
        """Forget ids at `position` and after."""
        self.check(position)
        for index in range(len(self._ids) - 1, position - 1, -1):
            self._change(index, self._ids.pop(), -1)

    def record(self, token: int) -> None:
        """The token at the next position."""
        if self._tracked:
            self._change(len(self._ids), token, 1)
            self._ids.append(token)

    def _change(self, index: int, token: int, by: int) -> None:
        for counter, counted in (
            (self._seen, self._repetition),
            (self._output, self._counts and index >= self._prompt_tokens),
        ):
            if counted:
                counter[token] += by
                if not counter[token]:
                    del counter[token]

    def shape(self, logits: Tensor) -> None:
        """Apply penalties and bias to this sequence's `logits [vocab]` in place."""
        params = self.params
        if self._seen:
            ids = torch.tensor(list(self._seen), device=logits.device)
            values = logits[ids]
            penalty = params.repetition_penalty
            # A tiny penalty could make infinities, whose differences are no numbers.
            raised = torch.where(values > 0, values / penalty, values * penalty)
            logits[ids] = raised.clamp_(max=torch.finfo(logits.dtype).max)
        if self._output:
            ids = torch.tensor(list(self._output), device=logits.device)
            counts = torch.tensor(list(self._output.values()), device=logits.device, dtype=logits.dtype)
            logits[ids] -= params.presence_penalty + params.frequency_penalty * counts
        if params.logit_bias:
            ids = torch.tensor([token for token, _ in params.logit_bias], device=logits.device)
            bias = torch.tensor([value for _, value in params.logit_bias], device=logits.device, dtype=logits.dtype)
            logits[ids] += bias

    @property
    def shapes(self) -> bool:
        """Whether `shape` could change anything."""
        return self._tracked or bool(self.params.logit_bias)


def sample(logits: Tensor, states: Sequence[SamplerState], positions: Sequence[int]) -> list[int]:
    """Draw row i's token for `positions[i]` from float32 `logits [n, vocab]` and record it in its state.

    Raises ValueError as `SamplerState.check` does, and where the model computed something that is no finite number.
    """
    for state, position in zip(states, positions, strict=True):
        state.rewind(position)
    shaped = [index for index, state in enumerate(states) if state.shapes]
    if shaped:
        logits = logits.clone()
        for index in shaped:
            states[index].shape(logits[index])
    best = best_tokens(logits)
    if not bool(torch.isfinite(logits.gather(-1, best.unsqueeze(-1))).all()):
        raise ValueError(
            "the model computed logits that are not finite numbers; its weights may be damaged, or model.dtype too "
            'narrow for them: try "bfloat16" or "float32"'
        )
    tokens: list[int] = best.tolist()
    drawn = [index for index, state in enumerate(states) if not state.params.greedy]
    if drawn:
        params = [states[index].params for index in drawn]
        numbers = [uniform(p.seed, p.choice, positions[i]) for p, i in zip(params, drawn, strict=True)]
        rows = logits if len(drawn) == len(states) else logits[torch.tensor(drawn, device=logits.device)]
        for index, token in zip(drawn, _draw(rows, params, numbers), strict=True):
            tokens[index] = token
    for state, token in zip(states, tokens, strict=True):
        state.record(token)
    return tokens


def best_tokens(logits: Tensor) -> Tensor:
    """`logits.argmax(-1)` of `[n, vocab]`, several times faster on a CPU: the best block first, then inside it."""
    rows, vocab = logits.shape
    if vocab % _BLOCK or logits.is_cuda:
        return logits.argmax(-1)
    blocks = logits.view(rows, -1, _BLOCK)
    block = blocks.amax(-1).argmax(-1)
    inside = blocks[torch.arange(rows), block].argmax(-1)
    return block * _BLOCK + inside


def _draw(logits: Tensor, params: Sequence[SamplingParams], numbers: Sequence[float]) -> list[int]:
    """Row i's token for the uniform number `numbers[i]`."""
    device = logits.device
    # What float32 cannot hold would be 0. The best is taken off first, so that a tiny temperature divides differences
    # and cannot overflow.
    least = torch.finfo(logits.dtype).tiny
    temperatures = torch.tensor([max(p.temperature, least) for p in params], device=device).unsqueeze(-1)
    scaled = (logits - logits.amax(-1, keepdim=True)) / temperatures
    for row, p in enumerate(params):
        if 0 < p.top_k < scaled.shape[-1]:
            floor = scaled[row].topk(p.top_k).values[-1]
            scaled[row].masked_fill_(scaled[row] < floor, float("-inf"))
    probabilities = torch.softmax(scaled, -1)
    for row, p in enumerate(params):
        if p.top_p < 1.0:
            floor = _nucleus_floor(probabilities[row], p.top_p)
            probabilities[row].masked_fill_(probabilities[row] < floor, 0.0)
        if p.min_p > 0.0:
            peak = probabilities[row].amax()
            probabilities[row].masked_fill_(probabilities[row] < p.min_p * peak, 0.0)
    cumulative = probabilities.to(torch.float64).cumsum(-1)
    targets = torch.tensor(numbers, device=device, dtype=torch.float64).unsqueeze(-1) * cumulative[:, -1:]
    tokens: list[int] = torch.searchsorted(cumulative, targets, right=True).squeeze(-1).tolist()
    return tokens


def _nucleus_floor(probabilities: Tensor, top_p: float) -> Tensor:
    """The least probability in the smallest set of best tokens whose mass reaches `top_p`."""
    best = probabilities.topk(min(_NUCLEUS_TOKENS, probabilities.shape[-1])).values
    mass = best.cumsum(-1)
    if float(mass[-1]) < top_p and best.shape[-1] < probabilities.shape[-1]:
        best = probabilities.sort(descending=True).values
        mass = best.cumsum(-1)
    kept = int((mass < top_p).sum())
    return best[min(kept, best.shape[-1] - 1)]


def token_logprobs(logits: Tensor, tokens: Sequence[int], tops: Iterable[int]) -> list[TokenLogprobs]:
    """For each row of raw float32 `logits [n, vocab]` its token's log probability and the `tops[i]` best ones."""
    wanted = list(tops)
    logs = torch.log_softmax(logits, -1)
    chosen: list[float] = logs.gather(-1, torch.tensor(tokens, device=logs.device).unsqueeze(-1)).squeeze(-1).tolist()
    most = min(max(wanted, default=0), logs.shape[-1])
    if most == 0:
        return [TokenLogprobs(logprob) for logprob in chosen]
    values, ids = (part.tolist() for part in logs.topk(most))
    return [
        TokenLogprobs(logprob, tuple(zip(ids[row][:count], values[row][:count], strict=True)))
        for row, (logprob, count) in enumerate(zip(chosen, wanted, strict=True))
    ]
