"""The load client's statistics: what outcomes of requests sum up to."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "scripts"))

from bench_statistics import Outcome, Spread, summarize


def test_one_requests_times() -> None:
    outcome = Outcome(10, 4, sent_s=1.0, ended_s=3.5, event_times_s=(1.5, 2.0, 2.25, 3.0))
    assert outcome.first_token_s == 0.5
    assert outcome.per_token_s == pytest.approx(1.5 / 3)
    assert outcome.gaps_s == pytest.approx((0.5, 0.25, 0.75))


def test_time_per_token_counts_tokens_and_not_events() -> None:
    assert Outcome(1, 7, 0.0, 4.0, (1.0, 4.0)).per_token_s == pytest.approx(3.0 / 6)


def test_too_few_tokens_have_no_time_between_them() -> None:
    assert Outcome(1, 0, 0.0, 1.0).first_token_s is None
    one = Outcome(1, 1, 0.0, 1.0, (0.5,))
    assert (one.first_token_s, one.per_token_s, one.gaps_s) == (0.5, None, ())


def test_spread_of_known_values() -> None:
    spread = Spread.of(value / 1000 for value in range(1, 102))
    assert spread is not None
    assert (spread.count, spread.max_ms) == (101, pytest.approx(101.0))
    assert (spread.mean_ms, spread.p50_ms) == (pytest.approx(51.0), pytest.approx(51.0))
    assert (spread.p95_ms, spread.p99_ms) == (pytest.approx(96.0), pytest.approx(100.0))
    assert Spread.of([]) is None


def test_rates_count_completed_requests_over_the_whole_time() -> None:
    summary = summarize([
        Outcome(100, 10, sent_s=1.0, ended_s=3.0, event_times_s=(2.0, 3.0)),
        Outcome(50, 30, sent_s=2.0, ended_s=6.0, event_times_s=(5.0, 6.0)),
        Outcome(999, 5, sent_s=4.0, ended_s=11.0, event_times_s=(10.0,), error="boom"),
        Outcome(999, 0, sent_s=4.0, ended_s=5.0, error="boom"),
        Outcome(999, 0, sent_s=4.0, ended_s=5.0, error="other"),
    ])  # fmt: skip
    assert (summary.requests, summary.completed, summary.errors) == (5, 2, {"boom": 2, "other": 1})
    assert summary.duration_s == 10.0
    assert summary.requests_per_s == pytest.approx(0.2)
    assert summary.output_tokens_per_s == pytest.approx(4.0)
    assert summary.total_tokens_per_s == pytest.approx(19.0)
    assert summary.ttft is not None
    assert summary.ttft.mean_ms == pytest.approx(2000.0)
    assert summary.e2e is not None
    assert summary.e2e.max_ms == pytest.approx(4000.0)


def test_a_test_in_which_everything_failed() -> None:
    summary = summarize([Outcome(1, 0, 0.0, 0.0, error="refused")])
    assert (summary.completed, summary.ttft, summary.output_tokens_per_s) == (0, None, 0.0)


def test_nothing_cannot_be_summed_up() -> None:
    with pytest.raises(ValueError, match="no request"):
        summarize([])
