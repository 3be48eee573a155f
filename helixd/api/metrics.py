"""The figures of the HTTP surface for Prometheus: requests, tokens, times, refusals.

Names start with `helixd_`; with `vllm_names` the figures that mean the same are also published under vLLM's names,
which dashboards and autoscalers know. Labels are few and bounded: never a request id, a key or a user. Other rooms may
add their own collectors to the same registry.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

FIRST_TOKEN_S = (0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
INTER_TOKEN_S = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.4, 1.0, 3.0, 10.0)
TOTAL_S = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0)


class _Gauges:
    def __init__(self, gauges: Sequence[Gauge]) -> None:
        self._gauges = gauges

    @contextmanager
    def track(self) -> Iterator[None]:
        """Count one for as long as the block runs."""
        for gauge in self._gauges:
            gauge.inc()
        try:
            yield
        finally:
            for gauge in self._gauges:
                gauge.dec()


class _Histograms:
    def __init__(self, histograms: Sequence[Histogram]) -> None:
        self._histograms = histograms

    def observe(self, seconds: float) -> None:
        """Take in one duration."""
        for histogram in self._histograms:
            histogram.observe(seconds)


class ApiMetrics:
    """One owner for all figures of this room."""

    def __init__(self, registry: CollectorRegistry, model_name: str, *, vllm_names: bool) -> None:
        self._registry = registry
        self._model = model_name
        self._prefixes = ("helixd_", "vllm:") if vllm_names else ("helixd_",)
        self.running = self._gauges("num_requests_running", "Generations admitted and not ended")
        self.waiting = self._gauges("num_requests_waiting", "Generations waiting for admission")
        self.first_token_s = self._histograms(
            "time_to_first_token_seconds", "From a checked request to its first token", FIRST_TOKEN_S
        )
        self.inter_token_s = self._histograms(
            "inter_token_latency_seconds", "Between two tokens of a choice", INTER_TOKEN_S
        )
        self._total_s = self._histograms("e2e_request_latency_seconds", "From a checked request to its end", TOTAL_S)
        self._prompt_tokens = self._counters("prompt_tokens", "Prompt tokens of admitted requests")
        self._generation_tokens = self._counters("generation_tokens", "Tokens generated")
        self._ended = self._counters("request_success", "Choices that ended, by reason", "finished_reason")
        self._rejections = Counter(
            "helixd_admission_rejections", "Requests answered with an error, by reason", ["reason"], registry=registry
        )
        self.slow_client_aborts = Counter(
            "helixd_slow_client_aborts", "Streams cut off because the client did not read", registry=registry
        )
        self.loop_lag_s = Gauge(
            "helixd_loop_lag_seconds", "How late the event loop was when it last looked at the clock", registry=registry
        )
        self.unknown_fields = Counter(
            "helixd_unknown_request_fields", "Request fields that no table knows; they are ignored", registry=registry
        )

    def finished(self, prompt_tokens: int, completion_tokens: int, reasons: list[str], total_s: float) -> None:
        """An admitted request has ended; one reason per choice."""
        for counter in self._prompt_tokens:
            counter.labels(self._model).inc(prompt_tokens)
        for counter in self._generation_tokens:
            counter.labels(self._model).inc(completion_tokens)
        for counter in self._ended:
            for reason in reasons:
                counter.labels(self._model, reason).inc()
        self._total_s.observe(total_s)

    def rejected(self, reason: str) -> None:
        """A request was answered with an error."""
        self._rejections.labels(reason).inc()

    def exposition(self) -> bytes:
        """All figures of the registry in Prometheus' text format."""
        return generate_latest(self._registry)

    def _gauges(self, stem: str, text: str) -> _Gauges:
        return _Gauges(
            [Gauge(p + stem, text, ["model_name"], registry=self._registry).labels(self._model) for p in self._prefixes]
        )

    def _histograms(self, stem: str, text: str, buckets: tuple[float, ...]) -> _Histograms:
        histograms = [
            Histogram(prefix + stem, text, ["model_name"], buckets=buckets, registry=self._registry)
            for prefix in self._prefixes
        ]
        return _Histograms([histogram.labels(self._model) for histogram in histograms])

    def _counters(self, stem: str, text: str, *labels: str) -> list[Counter]:
        return [Counter(p + stem, text, ["model_name", *labels], registry=self._registry) for p in self._prefixes]
