"""Measuring a link whose speed is known exactly, on an invented clock."""

import asyncio

import pytest

from helixd.errors import PeerLost
from helixd.ids import PeerId
from helixd.wire.link import LinkMeasurement
from helixd.wire.options import KIB, MIB
from helixd.wire.probe import ProbeDesk, measure


class Line:
    """A link with a clock of its own."""

    def __init__(self, rtt_s: float, bandwidth_bytes_per_s: float) -> None:
        self.rtt_s = rtt_s
        self.bandwidth_bytes_per_s = bandwidth_bytes_per_s
        self.now_s = 100.0
        self.sizes: list[int] = []

    async def ping(self) -> None:
        self.now_s += self.rtt_s

    async def transfer(self, payload: memoryview) -> None:
        self.sizes.append(payload.nbytes)
        self.now_s += self.rtt_s + payload.nbytes / self.bandwidth_bytes_per_s

    async def measure(self, max_bytes: int) -> LinkMeasurement:
        return await measure("far", self.ping, self.transfer, lambda: self.now_s, max_bytes, 5.0)


@pytest.mark.parametrize("rtt_s", [0.0001, 0.05])
@pytest.mark.parametrize("bandwidth", [1e6, 1.25e7, 1.25e8, 1.25e9])
async def test_a_line_is_measured_as_it_is(rtt_s: float, bandwidth: float) -> None:
    line = Line(rtt_s, bandwidth)
    found = await line.measure(256 * MIB)
    assert found.rtt_s == pytest.approx(rtt_s)
    assert found.bandwidth_bytes_per_s == pytest.approx(bandwidth, rel=0.01)
    assert found.bytes_sent == sum(line.sizes)


@pytest.mark.parametrize("budget", [64 * KIB, 64 * KIB + 1, 300 * KIB, MIB, 5 * MIB])
async def test_the_budget_is_never_exceeded_and_slow_lines_cost_little(budget: int) -> None:
    fast = Line(0.001, 1e12)
    found = await fast.measure(budget)
    assert found.bytes_sent == sum(fast.sizes) <= budget
    slow = Line(0.001, 1e5)
    await slow.measure(budget)
    assert slow.sizes == [64 * KIB]


async def test_both_sides_of_the_smallest_budget() -> None:
    assert (await Line(0.001, 1e6).measure(64 * KIB)).bytes_sent == 64 * KIB
    with pytest.raises(ValueError, match="65536"):
        await Line(0.001, 1e6).measure(64 * KIB - 1)


async def test_a_transfer_lost_in_the_round_trips_noise_gives_a_finite_number() -> None:
    line = Line(0.5, 1e15)
    assert 0 < (await line.measure(MIB)).bandwidth_bytes_per_s < 1e12


async def test_no_answer_in_time_names_the_peer() -> None:
    async def never() -> None:
        await asyncio.Event().wait()

    with pytest.raises(PeerLost, match=r"far.*0\.01 s"):
        await measure("far", never, Line(0.0, 1.0).transfer, lambda: 0.0, MIB, 0.01)


async def test_answers_find_who_waits_and_late_ones_nobody() -> None:
    desk = ProbeDesk()
    token, answered = desk.expect()
    other, still = desk.expect()
    desk.answer(token + 1000)
    desk.answer(token)
    desk.answer(token)
    await answered
    assert token != other
    assert not still.done()
    desk.fail(PeerLost(PeerId("far"), "gone"))
    with pytest.raises(PeerLost, match="gone"):
        await still
    await asyncio.sleep(0)
    desk.fail(PeerLost(PeerId("far"), "gone again"))
