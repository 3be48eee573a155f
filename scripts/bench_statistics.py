"""What a load test says: outcomes of single requests to rates and percentiles. Pure; knows no HTTP and no clock."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request, its times in seconds since the load test began.

    `event_times_s`: when each streamed event with output arrived. `output_tokens`: as the server's usage says, else one
    per event. `error`: why it failed; None if it ended as it should.
    """

    input_tokens: int
    output_tokens: int
    sent_s: float
    ended_s: float
    event_times_s: tuple[float, ...] = ()
    error: str | None = None

    @property
    def first_token_s(self) -> float | None:
        """Time to the first output (TTFT); None without any."""
        return self.event_times_s[0] - self.sent_s if self.event_times_s else None

    @property
    def per_token_s(self) -> float | None:
        """Mean time per output token after the first (TPOT); None with fewer than two."""
        if len(self.event_times_s) < 2 or self.output_tokens < 2:
            return None
        return (self.event_times_s[-1] - self.event_times_s[0]) / (self.output_tokens - 1)

    @property
    def gaps_s(self) -> tuple[float, ...]:
        """Times between neighbouring events: what a reader of the stream waits."""
        return tuple(
            later - earlier for earlier, later in zip(self.event_times_s, self.event_times_s[1:], strict=False)
        )


@dataclass(frozen=True, slots=True)
class Spread:
    """Mean and percentiles of a time, in milliseconds; `count` values."""

    count: int
    mean_ms: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    max_ms: float

    @classmethod
    def of(cls, values_s: Iterable[float]) -> "Spread | None":
        """The spread of values in seconds (percentiles linear between neighbours); None without values."""
        values_ms = np.fromiter(values_s, dtype=np.float64) * 1000
        if not values_ms.size:
            return None
        p50, p95, p99 = (float(value) for value in np.percentile(values_ms, [50, 95, 99]))
        return cls(values_ms.size, float(values_ms.mean()), p50, p95, p99, float(values_ms.max()))


@dataclass(frozen=True, slots=True)
class Summary:
    """A load test's result. Rates and times are of completed requests, over the time from first sent to last ended."""

    requests: int
    completed: int
    errors: dict[str, int]
    duration_s: float
    requests_per_s: float
    input_tokens: int
    output_tokens: int
    output_tokens_per_s: float
    total_tokens_per_s: float
    ttft: Spread | None
    tpot: Spread | None
    inter_token: Spread | None
    e2e: Spread | None

    def to_dict(self) -> dict[str, object]:
        """As JSON carries it."""
        return asdict(self)


def summarize(outcomes: Sequence[Outcome]) -> Summary:
    """The figures of a load test. Raises ValueError without outcomes."""
    if not outcomes:
        raise ValueError("no request was made, so there is nothing to sum up")
    completed = [outcome for outcome in outcomes if outcome.error is None]
    duration_s = max(outcome.ended_s for outcome in outcomes) - min(outcome.sent_s for outcome in outcomes)
    input_tokens = sum(outcome.input_tokens for outcome in completed)
    output_tokens = sum(outcome.output_tokens for outcome in completed)
    per_s = 1 / duration_s if duration_s > 0 else 0.0
    return Summary(
        requests=len(outcomes),
        completed=len(completed),
        errors=dict(Counter(outcome.error for outcome in outcomes if outcome.error is not None).most_common()),
        duration_s=duration_s,
        requests_per_s=len(completed) * per_s,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        output_tokens_per_s=output_tokens * per_s,
        total_tokens_per_s=(input_tokens + output_tokens) * per_s,
        ttft=Spread.of(value for outcome in completed if (value := outcome.first_token_s) is not None),
        tpot=Spread.of(value for outcome in completed if (value := outcome.per_token_s) is not None),
        inter_token=Spread.of(gap for outcome in completed for gap in outcome.gaps_s),
        e2e=Spread.of(outcome.ended_s - outcome.sent_s for outcome in completed),
    )
