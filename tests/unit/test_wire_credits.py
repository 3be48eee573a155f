"""Credits: an honest sender is never stopped for good nor accused, a dishonest one is caught."""

import asyncio
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helixd.errors import PeerLost
from helixd.ids import PeerId
from helixd.wire.credits import FRAME_OVERHEAD_BYTES, CreditGate, CreditReturn, frame_charge
from helixd.wire.errors import FrameError

WINDOW = 16 * 1024


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 4 * WINDOW), max_size=40), st.randoms(use_true_random=False))
def test_every_frame_passes_in_the_end_and_the_window_holds(frames: list[int], chance) -> None:
    gate, returned = CreditGate(WINDOW), CreditReturn(WINDOW)
    under_way: deque[int] = deque()
    for size in frames:
        while not (charge := gate.take(size)):
            assert under_way, "nothing is under way and the frame does not pass"
            if credit := returned.handled(under_way.popleft()):
                gate.give(credit)
        assert charge == returned.took(size) == frame_charge(size, WINDOW)
        under_way.append(charge)
        assert sum(under_way) <= WINDOW
        if under_way and chance.random() < 0.5 and (credit := returned.handled(under_way.popleft())):
            gate.give(credit)


def test_both_sides_of_the_window() -> None:
    returned = CreditReturn(WINDOW)
    tiny = WINDOW // FRAME_OVERHEAD_BYTES
    for _ in range(tiny):
        returned.took(0)
    with pytest.raises(FrameError, match=str(WINDOW)):
        returned.took(0)
    gate = CreditGate(WINDOW)
    assert all(gate.take(0) for _ in range(tiny))
    assert gate.take(0) == 0
    gate.give(WINDOW)
    with pytest.raises(FrameError, match="never taken"):
        gate.give(1)


@pytest.mark.parametrize("credit", [0, -1, WINDOW + 1])
def test_credits_that_cannot_be_are_refused(credit: int) -> None:
    gate = CreditGate(WINDOW)
    gate.take(100)
    with pytest.raises(FrameError):
        gate.give(credit)


def test_credits_come_back_in_lots() -> None:
    returned = CreditReturn(WINDOW)
    charges = [returned.took(WINDOW // 8) for _ in range(4)]
    given_back = [returned.handled(charge) for charge in charges]
    assert given_back[0] == 0
    assert sum(given_back) >= sum(charges) - WINDOW // 4


async def test_waiters_pass_in_order_and_no_newcomer_overtakes_them() -> None:
    gate = CreditGate(WINDOW)
    full = gate.take(WINDOW)
    gate.take(WINDOW)
    passed: list[str] = []

    async def wait(name: str, size: int) -> None:
        await gate.acquire(size)
        passed.append(name)

    tasks = [asyncio.ensure_future(wait("large", WINDOW)), asyncio.ensure_future(wait("small", 0))]
    await asyncio.sleep(0)
    assert gate.waiting
    gate.give(1000)
    assert gate.take(0) == 0, "there is room for a tiny frame, but others came first"
    await asyncio.sleep(0)
    assert passed == []
    gate.give(full)
    await asyncio.gather(*tasks)
    assert passed == ["large", "small"]
    assert not gate.waiting


@pytest.mark.parametrize("granted", [False, True])
async def test_a_cancelled_waiter_takes_nothing_with_it(granted: bool) -> None:
    gate = CreditGate(WINDOW)
    gate.take(WINDOW)
    gate.take(WINDOW)
    first = asyncio.ensure_future(gate.acquire(WINDOW))
    second = asyncio.ensure_future(gate.acquire(WINDOW))
    await asyncio.sleep(0)
    if granted:
        gate.give(WINDOW // 2)
    first.cancel()
    await asyncio.wait([first])
    if not granted:
        gate.give(WINDOW // 2)
    assert await second == WINDOW // 2
    assert gate.take(0) == 0
    gate.give(WINDOW)


async def test_a_lost_peer_wakes_every_waiter() -> None:
    gate = CreditGate(WINDOW)
    gate.take(WINDOW)
    gate.take(WINDOW)
    waiting = [asyncio.ensure_future(gate.acquire(size)) for size in (0, WINDOW, 5)]
    await asyncio.sleep(0)
    gate.fail(PeerLost(PeerId("far"), "gone"))
    results = await asyncio.gather(*waiting, return_exceptions=True)
    assert all(isinstance(result, PeerLost) for result in results)
