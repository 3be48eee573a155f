"""When the watchdog is petted: often enough while all is well, and not at all while it is not."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helixd.service.pulse import MAX_LAG_S, Pulse


@pytest.mark.parametrize("interval_s", [0.6, 3.0, 30.0, 600.0])
def test_it_is_petted_at_least_every_third_of_the_interval(interval_s: float) -> None:
    pulse = Pulse(interval_s)
    pets = [n * pulse.tick_s for n in range(200) if pulse.beat(n * pulse.tick_s, 0.0, overdue=False)]
    gaps = [after - before for before, after in itertools.pairwise(pets)]
    assert pets[0] == 0
    assert all(gap <= interval_s / 3 + 1e-9 for gap in gaps)
    assert len(pets) <= 200 * pulse.tick_s / (interval_s / 3 - pulse.tick_s) + 1


def test_no_watchdog_no_pets() -> None:
    assert not any(Pulse(None).beat(now_s, 0.0, overdue=False) for now_s in range(100))


@given(st.lists(st.tuples(st.floats(0, 20), st.booleans()), max_size=50))
def test_it_is_never_petted_while_the_loop_lags_or_a_device_hangs(ticks: list[tuple[float, bool]]) -> None:
    pulse = Pulse(6.0)
    now_s = 0.0
    for lag_s, overdue in ticks:
        now_s += pulse.tick_s + lag_s
        if pulse.beat(now_s, lag_s, overdue):
            assert lag_s < MAX_LAG_S
            assert not overdue


def test_it_is_petted_at_once_when_all_is_well_again() -> None:
    pulse = Pulse(30.0)
    assert pulse.beat(0.0, 0.0, overdue=False)
    assert not pulse.beat(15.0, 6.0, overdue=False)
    assert not pulse.beat(16.0, 0.0, overdue=True)
    assert pulse.beat(17.0, 4.9, overdue=False)
