"""When a peer is dead, on an invented clock."""

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helixd.wire.credits import CreditGate
from helixd.wire.errors import FrameError
from helixd.wire.liveness import ProgressWatch, RoundTrip, SilenceClock
from helixd.wire.options import WireOptions
from helixd.wire.upkeep import KIND_PING, Upkeep

TICK_S, LIMIT_S = 0.5, 3.0


def dead_at(clock: SilenceClock, ticks_s: list[float]) -> float | None:
    return next((now_s for now_s in ticks_s if clock.tick(now_s, heard=False)), None)


def test_silence_is_too_long_at_the_limit_and_not_before() -> None:
    assert dead_at(SilenceClock(TICK_S, LIMIT_S, 0.0), [0.5, 1.0, 1.5, 2.0, 2.5, 3.0]) == 3.0


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 1e6), max_size=5))
def test_a_stall_of_our_own_is_never_held_against_the_peer(stalls_s: list[float]) -> None:
    clock, now_s = SilenceClock(TICK_S, LIMIT_S, 0.0), 0.0
    for stall_s in stalls_s:
        now_s += stall_s
        assert not clock.tick(now_s, heard=False)


def test_a_sign_of_life_begins_the_silence_anew() -> None:
    clock = SilenceClock(TICK_S, LIMIT_S, 0.0)
    assert dead_at(clock, [0.5, 1.0, 1.5, 2.0, 2.5]) is None
    # It may have come at the last moment, so the whole limit must pass after this tick.
    assert not clock.tick(3.0, heard=True)
    assert dead_at(clock, [3.5, 4.0, 4.5, 5.0, 5.5, 6.0]) == 6.0


def test_ticks_that_come_a_hair_early_cost_no_further_one() -> None:
    assert dead_at(SilenceClock(TICK_S, LIMIT_S, 0.0), [n * 0.4999 for n in range(1, 9)]) == pytest.approx(6 * 0.4999)


def test_progress_or_an_empty_queue_are_no_standstill() -> None:
    watch = ProgressWatch(1.0, 3.0, 0.0)
    assert not any(watch.tick(float(now), progress=now, waiting=True) for now in range(1, 10))
    assert not any(watch.tick(float(now), progress=9, waiting=False) for now in range(10, 20))
    assert [watch.tick(float(now), progress=9, waiting=True) for now in (20, 21, 22)] == [False, False, True]


def test_only_the_answer_to_the_last_ping_counts() -> None:
    round_trip = RoundTrip()
    first = round_trip.sent(1.0)
    last = round_trip.sent(2.0)
    round_trip.answered(first, 2.5)
    assert round_trip.smoothed_s is None
    round_trip.answered(last, 2.25)
    assert round_trip.smoothed_s == 0.25
    round_trip.answered(round_trip.sent(3.0), 3.05)
    assert 0.05 < round_trip.smoothed_s < 0.25


@pytest.mark.parametrize(
    ("name", "fits", "breaks"),
    [
        ("ping_interval_s", 1.5, 1.6),
        ("ping_interval_s", 0.001, 0.0),
        ("send_deadline_s", 0.1, 0.0),
        ("close_timeout_s", 0.1, -1.0),
        ("auth_timeout_s", 0.1, 0.0),
        ("tcp_user_timeout_s", 0.1, 0.0),
        ("max_pending", 1, 0),
        ("preauth_bytes", 1024, 1023),
        ("small_payload_bytes", 1, 0),
        ("max_body_bytes", 1, 0),
        ("max_frame_bytes", 1, 0),
        ("chunk_bytes", 1024, 1023),
        ("small_window_bytes", 4096, 4095),
        ("bulk_window_bytes", 4096, 4095),
    ],
)
def test_options_that_contradict_each_other_are_refused_by_name(name: str, fits: float, breaks: float) -> None:
    WireOptions(**{name: fits})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=name):
        WireOptions(**{name: breaks})  # type: ignore[arg-type]


async def test_the_pings_of_a_silence_that_is_allowed_may_come_all_at_once() -> None:
    """We were stopped for nearly as long as the peer bears; it pings more often than we do."""
    options = WireOptions(ping_interval_s=0.5, dead_after_s=60.0)
    said: list[tuple[int, list[int]]] = []
    gates = CreditGate(1 << 20), CreditGate(1 << 20)
    sender: Any = SimpleNamespace(progress=0, waiting=False)
    upkeep = Upkeep(options, *gates, sender, lambda kind, body: said.append((kind, body)))
    for number in range(590):
        upkeep.take(KIND_PING, [number])
    assert [body for _, body in said] == [[number] for number in range(590)]

    def flood() -> None:
        for number in range(100_000):
            upkeep.take(KIND_PING, [number])

    with pytest.raises(FrameError, match="pings in"):
        flood()
