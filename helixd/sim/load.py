"""What the clients send: lengths drawn from a trace, and when requests come. Chance comes from a seed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

from helixd.sim.job import Request

INPUT_SPREAD, OUTPUT_SPREAD = 0.9, 0.7
INTERVAL_S = 3.0
"""The arrival trace counts requests per interval of this length."""


class Lengths:
    """(input, output) pairs drawn uniformly with replacement. Raises ValueError if there are none."""

    def __init__(self, pairs: Sequence[tuple[int, int]]) -> None:
        if not pairs or min(min(pair) for pair in pairs) < 1:
            raise ValueError("a trace of lengths needs pairs of at least one token each")
        self.pairs = tuple(pairs)

    @classmethod
    def around(cls, mean_input: float, mean_output: float, *, seed: int, count: int = 4000) -> "Lengths":
        """Made-up lengths with these means, spread as conversations are: many short, few long (log-normal)."""
        chance = Random(seed)  # noqa: S311
        pairs: list[tuple[int, int]] = []
        for _ in range(count):
            drawn = [
                round(mean * chance.lognormvariate(-spread * spread / 2, spread))
                for mean, spread in ((mean_input, INPUT_SPREAD), (mean_output, OUTPUT_SPREAD))
            ]
            pairs.append((max(1, drawn[0]), max(1, drawn[1])))
        return cls(pairs)

    @property
    def mean_tokens(self) -> float:
        """Mean input + output tokens of a request."""
        return sum(a + b for a, b in self.pairs) / len(self.pairs)

    @property
    def mean_output_tokens(self) -> float:
        """Mean output tokens of a request."""
        return sum(b for _, b in self.pairs) / len(self.pairs)

    def draws(self, seed: int) -> Iterator[Request]:
        """Requests without end."""
        chance = Random(seed)  # noqa: S311
        while True:
            yield Request(*chance.choice(self.pairs))


@dataclass(frozen=True, slots=True)
class Offline:
    """There is always more work than fits. `in_flight`: keep so many requests going; None: as the policy likes."""

    in_flight: int | None = None
    warmup_s: float = 60.0
    measure_s: float = 600.0


@dataclass(frozen=True, slots=True)
class Online:
    """Requests that arrive at `tokens_per_s` (input + output), with the bursts of `per_interval` counts.

    An empty `per_interval` means Poisson arrivals.
    """

    tokens_per_s: float
    per_interval: tuple[int, ...] = ()
    warmup_s: float = 0.0
    measure_s: float = 1800.0

    def arrivals(self, lengths: Lengths, seed: int) -> Iterator[tuple[float, Request]]:
        """(seconds from the start, request), in order, without end."""
        chance = Random(seed)  # noqa: S311
        requests = lengths.draws(seed + 1)
        per_s = self.tokens_per_s / lengths.mean_tokens
        if not self.per_interval:
            now_s = 0.0
            while True:
                now_s += chance.expovariate(per_s)
                yield now_s, next(requests)
        scale = per_s * INTERVAL_S * len(self.per_interval) / sum(self.per_interval)
        start_s = 0.0
        while True:
            wanted = chance.choice(self.per_interval) * scale
            count = int(wanted) + (chance.random() < wanted % 1)
            for offset_s in sorted(chance.uniform(0, INTERVAL_S) for _ in range(count)):
                yield start_s + offset_s, next(requests)
            start_s += INTERVAL_S


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests at given times (seconds from the start, in order); `measure_s` past which nothing counts."""

    requests: tuple[tuple[float, Request], ...]
    warmup_s: float = 0.0
    measure_s: float = 1800.0

    def arrivals(self, lengths: Lengths, seed: int) -> Iterator[tuple[float, Request]]:
        """The requests as given."""
        return iter(self.requests)


Load = Offline | Online | Trace
