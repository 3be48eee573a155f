"""How long an answer will be: learnt online from the answers that ended, never a constant.

A decaying histogram of output lengths in buckets that widen with length. It answers how many more tokens a sequence
is likely to emit, given what it has emitted and the most it may.
"""

from math import log2

_BUCKETS_PER_OCTAVE = 4


class OutputLength:
    """Expected output tokens. `prior_tokens` (a workload's mean) counts as `prior_weight` answers until better known.

    `memory` is about how many recent answers count.
    """

    def __init__(self, prior_tokens: float, *, prior_weight: float = 8.0, memory: float = 500.0) -> None:
        if prior_tokens <= 0 or prior_weight <= 0 or memory <= 1:
            raise ValueError("prior_tokens, prior_weight must be positive and memory above 1")
        self._decay = 1 - 1 / memory
        self._weights: dict[int, float] = {}
        self._sums: dict[int, float] = {}
        self._add(prior_tokens, prior_weight)

    def observe(self, output_tokens: int) -> None:
        """An answer ended with that many tokens."""
        for bucket in self._weights:
            self._weights[bucket] *= self._decay
            self._sums[bucket] *= self._decay
        self._add(max(1, output_tokens), 1.0)

    def expect(self, max_tokens: int, *, emitted: int = 0) -> int:
        """How many more tokens to expect: mean over answers longer than `emitted`, cut at `max_tokens` in all.

        At least 1 and at most `max_tokens - emitted` (if that is positive).
        """
        limit = max(1, max_tokens - emitted)
        weight = total = 0.0
        for bucket, share in self._weights.items():
            mean = self._sums[bucket] / share if share > 0 else 0.0
            if mean > emitted:
                weight += share
                total += share * min(mean - emitted, limit)
        if weight <= 1e-6:
            # Longer than anything seen: as much again is the best guess of a heavy tail.
            return min(limit, max(1, emitted))
        return min(limit, max(1, round(total / weight)))

    def _add(self, tokens: float, weight: float) -> None:
        bucket = int(log2(tokens) * _BUCKETS_PER_OCTAVE)
        self._weights[bucket] = self._weights.get(bucket, 0.0) + weight
        self._sums[bucket] = self._sums.get(bucket, 0.0) + weight * tokens
