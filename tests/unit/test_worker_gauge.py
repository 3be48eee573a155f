"""How much slower than its profile a device is said to be, and what a link is said to carry."""

import pytest

from helixd.engine.types import LayerTimes
from helixd.layers import LayerRange
from helixd.plan.cluster.profile import layer_time_s
from helixd.wire.goodput import FRESH_S as LINK_FRESH_S
from helixd.wire.goodput import LEAST_BYTES, LEAST_S, SKIPPED_BYTES, Goodput
from helixd.worker.gauge import FADE_S, FRESH_S, KEPT, LEAST_STEPS, Slowdown, SpeedGauge

TIMES = LayerTimes(((16.0, 0.010), (64.0, 0.030), (256.0, 0.100)), ((1.0, 0.002), (4.0, 0.003), (16.0, 0.006)))
FOUR = LayerRange(0, 4)


@pytest.mark.parametrize("rows", [2, 16, 40, 64, 256, 1000])
def test_it_reads_the_profile_as_the_planner_does(rows: int) -> None:
    found = SpeedGauge(TIMES).expected([(FOUR, rows)])
    assert found.prefill_s == pytest.approx(4 * layer_time_s(TIMES.prompt_layer_time_s, rows))
    assert found.decode_s == 0
    found = SpeedGauge(TIMES).expected([(FOUR, 1)] * rows)
    assert found.decode_s == pytest.approx(4 * layer_time_s(TIMES.decode_layer_time_s, rows))
    assert found.prefill_s == 0


def test_who_enters_late_counts_only_where_he_computes() -> None:
    found = SpeedGauge(TIMES).expected([(FOUR, 1), (LayerRange(2, 4), 1), (LayerRange(3, 4), 64)])
    two = layer_time_s(TIMES.decode_layer_time_s, 2)
    assert found.decode_s == pytest.approx(2 * 0.002 + 2 * two)
    assert found.prefill_s == pytest.approx(0.030)
    assert SpeedGauge(TIMES).expected([]).decode_s == 0


def steps(gauge: SpeedGauge, count: int, slowdown: float, rows: list[int], *, began_s: float = 0.0) -> float:
    expected = gauge.expected([(FOUR, n) for n in rows])
    for number in range(count):
        gauge.took(expected, slowdown * (expected.prefill_s + expected.decode_s), began_s + number / 100)
    return began_s + count / 100


def test_too_few_steps_say_nothing_and_enough_say_how_slow() -> None:
    gauge = SpeedGauge(TIMES)
    now_s = steps(gauge, round(LEAST_STEPS), 3.0, [1])
    # The first has faded a little.
    assert gauge.slowdown(now_s) == (None, None)
    now_s = steps(gauge, 1, 3.0, [1], began_s=now_s)
    assert gauge.slowdown(now_s) == Slowdown(None, pytest.approx(3.0))


def test_what_was_not_done_lately_is_not_known() -> None:
    gauge = SpeedGauge(TIMES)
    now_s = steps(gauge, 50, 3.0, [64])
    assert gauge.slowdown(now_s).prefill == pytest.approx(3.0)
    last_s = now_s - 0.01
    assert gauge.slowdown(last_s + FRESH_S - 1e-6).prefill == pytest.approx(3.0)
    assert gauge.slowdown(last_s + FRESH_S + 1e-6).prefill is None


def test_what_is_done_seldom_fades_with_time() -> None:
    gauge = SpeedGauge(TIMES)
    expected = gauge.expected([(FOUR, 64)])
    for second in range(100):
        gauge.took(expected, expected.prefill_s * (10.0 if second < 50 else 1.0), float(second))
        if second == 49:
            assert gauge.slowdown(49.0).prefill == pytest.approx(10.0)
        if second == 49 + round(3 * FADE_S):
            assert gauge.slowdown(float(second)).prefill == pytest.approx(1.0, abs=0.4)


def test_a_step_with_both_counts_for_each_by_its_share() -> None:
    gauge = SpeedGauge(TIMES)
    now_s = steps(gauge, 100, 2.0, [1, 64])
    assert gauge.slowdown(now_s) == (pytest.approx(2.0), pytest.approx(2.0))
    # Decodes alone at their pace pull the one figure only.
    now_s = steps(gauge, 400, 1.0, [1], began_s=now_s)
    found = gauge.slowdown(now_s)
    assert found.prefill == pytest.approx(2.0)
    assert found.decode == pytest.approx(1.0, abs=0.1)


def test_it_follows_a_change_within_a_few_dozen_steps() -> None:
    gauge = SpeedGauge(TIMES)
    now_s = steps(gauge, 3000, 1.0, [1])
    now_s = steps(gauge, 32, 4.0, [1], began_s=now_s)
    assert gauge.slowdown(now_s).decode == pytest.approx(4.0 - 3.0 * KEPT**32, rel=0.05)
    now_s = steps(gauge, 150, 4.0, [1], began_s=now_s)
    assert gauge.slowdown(now_s).decode == pytest.approx(4.0, rel=0.01)


def test_a_time_that_is_not_known_is_no_time() -> None:
    gauge = SpeedGauge(TIMES)
    steps(gauge, 100, 0.0, [1])
    assert gauge.slowdown(1.0) == (None, None)


def send(
    goodput: Goodput, count: int, size: int, bytes_per_s: float, *, now_s: float = 0.0, more: bool = True
) -> float:
    for _ in range(count):
        now_s += size / bytes_per_s
        goodput.sent(size, now_s, more=more)
    return now_s


def test_a_busy_link_says_what_it_carries() -> None:
    goodput = Goodput()
    # The buffers take the first at no time.
    now_s = send(goodput, 1, SKIPPED_BYTES, 1e12)
    now_s = send(goodput, 60, 256 << 10, 10e6, now_s=now_s)
    assert goodput.seen(now_s) == pytest.approx(10e6)
    assert goodput.seen(now_s + LINK_FRESH_S - 0.01) == pytest.approx(10e6)
    assert goodput.seen(now_s + LINK_FRESH_S + 0.01) is None


def test_a_link_that_never_made_anybody_wait_says_nothing() -> None:
    goodput = Goodput()
    now_s = send(goodput, 100, 1 << 20, 10e6, more=False)
    assert goodput.seen(now_s) is None


@pytest.mark.parametrize(
    ("size", "bytes_per_s", "known"),
    [
        (LEAST_BYTES, LEAST_BYTES / LEAST_S, True),
        (LEAST_BYTES - 1, (LEAST_BYTES - 1) / LEAST_S, False),
        (LEAST_BYTES, LEAST_BYTES / LEAST_S * 1.01, False),
    ],
)
def test_little_or_short_says_nothing(size: int, bytes_per_s: float, known: bool) -> None:
    goodput = Goodput()
    now_s = send(goodput, 1, SKIPPED_BYTES, 1e12)
    now_s = send(goodput, 1, size, bytes_per_s, now_s=now_s)
    assert (goodput.seen(now_s) is not None) == known


def test_a_queue_that_was_empty_starts_anew() -> None:
    goodput = Goodput()
    now_s = send(goodput, 1, SKIPPED_BYTES, 1e12)
    now_s = send(goodput, 1, 1024, 1e12, now_s=now_s, more=False)
    assert goodput.seen(send(goodput, 2, LEAST_BYTES, 1e6, now_s=now_s)) is None
