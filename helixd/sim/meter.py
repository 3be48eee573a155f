"""What a run measured: passes inside a window of simulated time, latencies, and the summary of both."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from helixd.ids import NodeId


class Tally(Protocol):
    """Who counts what the nodes did."""

    def nodes(self) -> "Mapping[NodeId, NodeReport]":
        """Each node over the window."""
        ...

    def round_s(self, passes: int, mean_s: float) -> Mapping[str, float]:
        """Where the mean decode pass spent its time."""
        ...


@dataclass(frozen=True, slots=True)
class Quantiles:
    """Seconds. A percentile is `sorted[int(n * q)]`, as the paper's artifact takes it; all 0 if nothing was seen."""

    p50: float
    p95: float
    p99: float
    mean: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Quantiles":
        """Of any number of values."""
        if not values:
            return cls(0.0, 0.0, 0.0, 0.0, 0)
        ordered = sorted(values)
        count = len(ordered)

        def at(share: float) -> float:
            return ordered[min(count - 1, int(count * share))]

        return cls(at(0.5), at(0.95), at(0.99), sum(ordered) / count, count)


@dataclass(frozen=True, slots=True)
class NodeReport:
    """One node over the window. Shares are of its time, `kv_*` of its KV room, `mean_decodes` per batch with any."""

    busy: float
    prompt: float
    batches: int
    mean_decodes: float
    kv_mean: float
    kv_peak: float


@dataclass(frozen=True, slots=True)
class Report:
    """A run. Counts and rates are of the window; the life of a request may begin before it or end after it.

    `ttft_s`: from a request's creation to its first token at the coordinator, queueing included; `tpot_s`: of one
    decode pass; `request_tpot_s`: mean decode pass of a request; `e2e_s`: creation to last token.
    """

    policy: str
    window_s: float
    decode_tokens_per_s: float
    prompt_tokens_per_s: float
    ttft_s: Quantiles
    tpot_s: Quantiles
    request_tpot_s: Quantiles
    e2e_s: Quantiles
    started: int
    finished: int
    dropped: int
    preempted: int
    recovered: int
    mean_in_flight: float
    mean_waiting: float
    nodes: Mapping[NodeId, NodeReport] = field(default_factory=dict)
    round_s: Mapping[str, float] = field(default_factory=dict)
    events: int = 0

    @property
    def total_tokens_per_s(self) -> float:
        """Prompt and decode tokens."""
        return self.decode_tokens_per_s + self.prompt_tokens_per_s


class Meter:
    """Collects between `start_s` and `end_s`."""

    __slots__ = (
        "_flight_area", "_flight_s", "_waiting_area", "_waiting_s", "decode_tokens", "dropped", "e2e", "end_s",
        "finished", "in_flight", "passes", "preempted", "prompt_tokens", "prompts", "recovered", "request_tpot",
        "start_s", "started", "waiting",
    )  # fmt: skip

    def __init__(self, start_s: float, end_s: float) -> None:
        self.start_s, self.end_s = start_s, end_s
        self.passes: list[float] = []
        self.prompts: list[float] = []
        self.request_tpot: list[float] = []
        self.e2e: list[float] = []
        self.decode_tokens = self.prompt_tokens = 0
        self.started = self.finished = self.dropped = self.preempted = self.recovered = 0
        self.in_flight = self.waiting = 0
        self._flight_area = self._waiting_area = 0.0
        self._flight_s = self._waiting_s = start_s

    def decoded(self, now_s: float, took_s: float) -> None:
        """A decode pass came back."""
        if self.start_s <= now_s < self.end_s:
            self.decode_tokens += 1
            self.passes.append(took_s)

    def prompted(self, now_s: float, took_s: float, tokens: int) -> None:
        """A prompt's first token came back."""
        if self.start_s <= now_s < self.end_s:
            self.prompt_tokens += tokens
            self.prompts.append(took_s)

    def done(self, now_s: float, created_s: float, first_s: float, outputs: int) -> None:
        """A request is complete."""
        if self.start_s <= now_s < self.end_s:
            self.finished += 1
            self.e2e.append(now_s - created_s)
            if outputs:
                self.request_tpot.append((now_s - first_s) / outputs)

    def flying(self, now_s: float, change: int) -> None:
        """So many more requests hold a route."""
        self._flight_area += self.in_flight * max(0.0, min(now_s, self.end_s) - self._flight_s)
        self._flight_s = max(self._flight_s, min(now_s, self.end_s))
        self.in_flight += change

    def queued(self, now_s: float, change: int) -> None:
        """So many more requests wait for a route."""
        self._waiting_area += self.waiting * max(0.0, min(now_s, self.end_s) - self._waiting_s)
        self._waiting_s = max(self._waiting_s, min(now_s, self.end_s))
        self.waiting += change

    def report(self, policy: str, tally: Tally, events: int) -> Report:
        """The summary, at the end of the window."""
        self.flying(self.end_s, 0)
        self.queued(self.end_s, 0)
        window_s = self.end_s - self.start_s
        passes = Quantiles.of(self.passes)
        return Report(
            policy, window_s, self.decode_tokens / window_s, self.prompt_tokens / window_s,
            Quantiles.of(self.prompts), passes, Quantiles.of(self.request_tpot), Quantiles.of(self.e2e),
            self.started, self.finished, self.dropped, self.preempted, self.recovered,
            self._flight_area / window_s, self._waiting_area / window_s,
            tally.nodes(), tally.round_s(passes.count, passes.mean), events,
        )  # fmt: skip
