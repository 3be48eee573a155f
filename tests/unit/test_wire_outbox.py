"""What waits to be sent to a peer: in order, bounded, and nobody's trouble but the peer's own."""

import asyncio

import pytest

from helixd.errors import PeerLost
from helixd.ids import Incarnation, PeerId
from helixd.wire.errors import FrameError
from helixd.wire.link import Frame, LinkMeasurement
from helixd.wire.outbox import FRAME_OVERHEAD_BYTES, Outbox


class Peer:
    """A link that takes a frame whenever `taking` is set, and raises what it is told to."""

    peer = PeerId("far")
    incarnation = Incarnation(1)
    rtt_s = None
    remote_host = ""

    def __init__(self) -> None:
        self.closed: str | None = None
        self.sent: list[Frame] = []
        self.taking = asyncio.Event()
        self.taking.set()
        self.error: Exception | None = None

    async def send(self, frame: Frame) -> None:
        await self.taking.wait()
        if self.error is not None:
            raise self.error
        self.sent.append(frame)

    async def close(self, reason: str) -> None:
        self.closed = reason

    async def probe(self, max_bytes: int, timeout_s: float) -> LinkMeasurement:
        raise NotImplementedError


def large(kind: int, size: int) -> Frame:
    return Frame(kind, None, memoryview(bytes(size)))


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_urgent_frames_overtake_the_others_and_each_kind_stays_in_order() -> None:
    peer = Peer()
    outbox = Outbox(peer, lambda: None)
    for kind in range(6):
        outbox.post(Frame(kind, None), urgent=kind % 2 == 1)
    running = asyncio.ensure_future(outbox.run())
    await settle()
    assert [frame.kind for frame in peer.sent] == [1, 3, 5, 0, 2, 4]
    running.cancel()


async def test_frames_leave_in_order_and_room_is_told_once() -> None:
    peer, drained = Peer(), []
    outbox = Outbox(peer, lambda: drained.append(1), soft_bytes=3 * FRAME_OVERHEAD_BYTES, hard_bytes=1 << 20)
    peer.taking.clear()
    running = asyncio.ensure_future(outbox.run())
    for kind in range(3):
        outbox.post(Frame(kind, None))
    assert not outbox.congested
    outbox.post(Frame(3, None))
    assert outbox.congested
    await settle()
    peer.taking.set()
    await settle()
    await asyncio.sleep(0)
    assert [frame.kind for frame in peer.sent] == [0, 1, 2, 3]
    assert (outbox.congested, drained) == (False, [1])
    running.cancel()


@pytest.mark.parametrize(("size", "over"), [(1000 - FRAME_OVERHEAD_BYTES, False), (1001 - FRAME_OVERHEAD_BYTES, True)])
async def test_both_sides_of_the_hard_bound(size: int, over: bool) -> None:
    peer = Peer()
    outbox = Outbox(peer, lambda: None, soft_bytes=500, hard_bytes=1000)
    outbox.post(large(1, size))
    running = asyncio.ensure_future(outbox.run())
    await settle()
    assert running.done() is over
    assert (peer.closed is not None) is over
    assert len(peer.sent) == (0 if over else 1)
    outbox.post(Frame(2, None))
    await settle()
    assert len(peer.sent) == (0 if over else 2), "an outbox that overflowed takes nothing more"
    running.cancel()


async def test_a_lost_peer_ends_the_outbox_and_raises_nothing() -> None:
    peer = Peer()
    outbox = Outbox(peer, lambda: None)
    peer.error = PeerLost(peer.peer, "gone")
    outbox.post(Frame(1, None))
    outbox.post(Frame(2, None))
    await asyncio.wait_for(outbox.run(), 5)
    assert peer.closed is None, "whoever watches the link knows already"


async def test_a_peer_that_grants_too_little_for_a_frame_loses_its_link_and_nobody_else_anything() -> None:
    peer = Peer()
    outbox = Outbox(peer, lambda: None)
    peer.error = FrameError("the body of a frame of kind 7 is 80 bytes, at most 16 are allowed")
    outbox.post(Frame(7, None))
    await asyncio.wait_for(outbox.run(), 5)
    assert "at most 16 are allowed" in (peer.closed or "")
