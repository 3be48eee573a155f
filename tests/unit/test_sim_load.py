from itertools import islice, takewhile

import pytest

from helixd.sim.job import Request
from helixd.sim.load import Lengths, Online, Trace
from helixd.sim.meter import Meter, Quantiles

PAIRS = Lengths([(100, 20), (300, 60)])


def test_lengths_are_drawn_from_the_pairs_and_repeat_for_a_seed() -> None:
    first, again, other = (list(islice(PAIRS.draws(seed), 50)) for seed in (1, 1, 2))
    assert first == again != other
    assert set(first) == {Request(100, 20), Request(300, 60)}
    assert PAIRS.mean_tokens == 240
    assert PAIRS.mean_output_tokens == 40


@pytest.mark.parametrize("pairs", [[], [(0, 5)], [(5, 0)]])
def test_lengths_need_tokens(pairs: list[tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        Lengths(pairs)


def test_made_up_lengths_have_the_means_asked_for_and_a_tail() -> None:
    made = Lengths.around(750, 240, seed=0)
    assert sum(a for a, _ in made.pairs) / len(made.pairs) == pytest.approx(750, rel=0.1)
    assert made.mean_output_tokens == pytest.approx(240, rel=0.1)
    assert max(a for a, _ in made.pairs) > 3 * 750
    assert made.pairs == Lengths.around(750, 240, seed=0).pairs


@pytest.mark.parametrize("counts", [(), (0, 1, 9, 2)])
def test_arrivals_keep_the_rate_whatever_their_bursts(counts: tuple[int, ...]) -> None:
    load = Online(480.0, counts)
    came = list(takewhile(lambda item: item[0] < 3000, load.arrivals(PAIRS, 1)))
    assert len(came) == pytest.approx(6000, rel=0.1)
    times = [at for at, _ in came]
    assert times == sorted(times)
    assert came == list(takewhile(lambda item: item[0] < 3000, load.arrivals(PAIRS, 1)))
    assert came != list(takewhile(lambda item: item[0] < 3000, load.arrivals(PAIRS, 2)))


def test_bursts_are_as_uneven_as_their_counts() -> None:
    def spread(counts: tuple[int, ...]) -> float:
        per_interval = [0] * 1000
        for at, _ in takewhile(lambda item: item[0] < 3000, Online(480.0, counts).arrivals(PAIRS, 1)):
            per_interval[int(at / 3)] += 1
        mean = sum(per_interval) / 1000
        return sum((n - mean) ** 2 for n in per_interval) / 1000

    assert spread((5, 5)) < 2 < 20 < spread((0, 0, 0, 20))


def test_a_trace_is_taken_as_it_is() -> None:
    requests = ((0.5, Request(1, 2)), (0.7, Request(3, 4)))
    assert tuple(Trace(requests).arrivals(PAIRS, 9)) == requests


def test_percentiles_are_the_artifacts() -> None:
    seen = Quantiles.of([float(n) for n in range(10)])
    assert (seen.p50, seen.p95, seen.p99, seen.mean, seen.count) == (5.0, 9.0, 9.0, 4.5, 10)
    assert Quantiles.of([]).count == 0
    assert Quantiles.of([3.0]).p99 == 3.0


def test_only_the_window_counts() -> None:
    meter = Meter(10.0, 20.0)
    for now_s in (9.9, 10.0, 19.9, 20.0):
        meter.decoded(now_s, 1.0)
        meter.prompted(now_s, 2.0, 7)
        meter.done(now_s, 0.0, 5.0, 2)
    assert meter.decode_tokens == len(meter.passes) == 2
    assert meter.prompt_tokens == 14
    assert meter.finished == 2
    meter.flying(0.0, +4)
    meter.flying(15.0, -2)

    class Nothing:
        def nodes(self) -> dict[str, object]:
            return {}

        def round_s(self, passes: int, mean_s: float) -> dict[str, float]:
            return {"passes": passes, "mean": mean_s}

    report = meter.report("p", Nothing(), 5)
    assert report.mean_in_flight == pytest.approx((4 * 5 + 2 * 5) / 10)
    assert report.decode_tokens_per_s == 0.2
    assert report.total_tokens_per_s == pytest.approx(0.2 + 1.4)
    assert report.round_s == {"passes": 2, "mean": 1.0}
