"""What a link promises, whatever carries it: the same tests over memory and over websockets in both directions."""

import asyncio
from array import array
from typing import Any

import numpy as np
import pytest
import uvloop

from helixd.errors import PeerLost
from helixd.wire.errors import FrameError
from helixd.wire.link import Frame, Link
from helixd.wire.options import KIB, MIB, WireOptions
from tests.functional.wire_world import CARRIERS, DEADLINE_S, Side, linked

OPTIONS = WireOptions(
    small_payload_bytes=4 * KIB,
    chunk_bytes=16 * KIB,
    max_frame_bytes=MIB,
    small_window_bytes=16 * KIB,
    bulk_window_bytes=128 * KIB,
    close_timeout_s=0.2,
)
pytestmark = [
    pytest.mark.parametrize("carrier", CARRIERS),
    pytest.mark.filterwarnings("ignore:Overriding the .event_loop_policy:pytest.PytestDeprecationWarning"),
]


@pytest.fixture(params=[asyncio.DefaultEventLoopPolicy, uvloop.EventLoopPolicy], ids=["asyncio", "uvloop"])
def event_loop_policy(request: pytest.FixtureRequest) -> asyncio.AbstractEventLoopPolicy:
    return request.param()


def pattern(size: int, seed: int = 1) -> memoryview:
    return memoryview(np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8))


def nap(seconds: float = 0.05):
    """Give whatever must not happen the time to happen."""
    return asyncio.sleep(seconds)


async def test_bodies_arrive_as_they_were(carrier: str) -> None:
    bodies = [
        None,
        True,
        0,
        -1,
        2**63,
        1.5,
        "text",
        b"bytes",
        [],
        [1, [2, "x"]],
        {"a": {"b": [None]}},
        list(range(4096)),
    ]
    async with linked(carrier) as pair:
        for kind, body in enumerate(bodies):
            await pair.link.send(Frame(kind, body))
        frames = await pair.far.received(len(bodies))
    assert [(frame.kind, frame.body, frame.payload) for frame in frames] == [
        (kind, body, None) for kind, body in enumerate(bodies)
    ]


@pytest.mark.parametrize("around", [0, 1, 125, 4 * KIB, 16 * KIB, 32 * KIB, 64 * KIB, 128 * KIB, MIB])
async def test_payloads_of_every_size_around_the_limits(carrier: str, around: int) -> None:
    sizes = [size for size in range(around - 2, around + 3) if 0 <= size <= MIB]
    async with linked(carrier, OPTIONS) as pair:
        for size in sizes:
            payload = pattern(size)
            await pair.link.send(Frame(7, [size], payload))
            frame = (await pair.far.received(1))[0]
            pair.far.frames.clear()
            assert frame.body == [size]
            assert frame.payload is not None
            assert bytes(frame.payload) == bytes(payload)


async def test_received_memory_is_owned_and_writable(carrier: str) -> None:
    async with linked(carrier, OPTIONS) as pair:
        for size in (100, 50_000):
            await pair.link.send(Frame(1, None, pattern(size)))
            await pair.link.send(Frame(1, None, pattern(size)))
        frames = await pair.far.received(4)
        for frame in frames:
            assert frame.payload is not None
            assert not frame.payload.readonly
            assert frame.payload.format == "B"
            frame.payload[:] = bytes(frame.payload.nbytes)
            await pair.link.send(Frame(2, None, pattern(50_000, seed=3)))
        await pair.far.received(8)
        for frame in frames:
            assert frame.payload is not None
            assert not any(frame.payload)


@pytest.mark.parametrize("items", [100, 5000])
async def test_typed_payloads_travel_as_bytes(carrier: str, items: int) -> None:
    values = array("d", range(items))
    async with linked(carrier, OPTIONS) as pair:
        await pair.link.send(Frame(1, None, memoryview(values)))
        await pair.link.send(Frame(1, None, memoryview(np.ones((items, 2), dtype=np.int16))))
        typed, matrix = sorted(await pair.far.received(2), key=lambda frame: -len(frame.payload or b""))
    assert typed.payload is not None
    assert matrix.payload is not None
    assert array("d", bytes(typed.payload)) == values
    assert matrix.payload.nbytes == items * 4


async def test_order_holds_within_each_class(carrier: str) -> None:
    async with linked(carrier, OPTIONS) as pair:

        async def send(count: int, size: int, kind: int) -> None:
            for number in range(count):
                await pair.link.send(Frame(kind, number, pattern(size)))

        await asyncio.gather(send(300, 100, 1), send(60, 20_000, 2))
        frames = await pair.far.received(360)
    for kind, count in ((1, 300), (2, 60)):
        assert [frame.body for frame in frames if frame.kind == kind] == list(range(count))


async def test_many_senders_of_one_class_keep_the_order_in_which_they_called(carrier: str) -> None:
    async with linked(carrier, OPTIONS) as pair:
        sends = [pair.link.send(Frame(1, number, pattern(3000))) for number in range(64)]
        await asyncio.gather(*sends)
        frames = await pair.far.received(64)
    assert [frame.body for frame in frames] == list(range(64))


@pytest.mark.parametrize("size", [1000, 40_000])
async def test_credits_stop_a_fast_sender_until_the_handler_returns(carrier: str, size: int) -> None:
    release = asyncio.Event()
    async with linked(carrier, OPTIONS) as pair:

        async def wait(_: Link, __: Frame) -> None:
            await release.wait()

        pair.far.on_frame = wait
        sent = 0

        async def flood() -> None:
            nonlocal sent
            for number in range(100):
                await pair.link.send(Frame(1, number, pattern(size)))
                sent += 1

        async with asyncio.TaskGroup() as group:
            group.create_task(flood())
            await nap(0.2)
            window = OPTIONS.small_window_bytes if size < 4 * KIB else OPTIONS.bulk_window_bytes
            assert 0 < sent * size <= window
            assert pair.far.frames == []
            release.set()
        frames = await pair.far.received(100)
    assert [frame.body for frame in frames] == list(range(100))


async def test_a_frame_larger_than_the_window_passes(carrier: str) -> None:
    async with linked(carrier, OPTIONS) as pair:
        for number in range(3):
            await pair.link.send(Frame(1, number, pattern(8 * OPTIONS.bulk_window_bytes)))
        frames = await pair.far.received(3)
    assert [frame.body for frame in frames] == [0, 1, 2]


@pytest.mark.parametrize("size", [3000, 400_000])
async def test_memory_may_be_reused_once_send_returns(carrier: str, size: int) -> None:
    """A transport that keeps a reference to unsent memory would deliver what was written into it later."""
    options = WireOptions(small_payload_bytes=16, bulk_window_bytes=64 * MIB)
    async with linked(carrier, options) as pair:
        buffer = bytearray(size)
        for number in range(100):
            buffer[:] = bytes([number]) * size
            await pair.link.send(Frame(1, number, memoryview(buffer)))
            buffer[:] = b"\xff" * size
        frames = await pair.far.received(100)
        for frame in frames:
            assert frame.payload is not None
            assert bytes(frame.payload) == bytes([frame.body]) * size


async def test_a_cancelled_send_leaves_its_memory_and_the_link_intact(carrier: str) -> None:
    options = WireOptions(bulk_window_bytes=64 * MIB)
    async with linked(carrier, options) as pair:
        for number in range(10):
            buffer = bytearray(b"\x01") * (4 * MIB)
            task = asyncio.ensure_future(pair.link.send(Frame(1, number, memoryview(buffer))))
            await asyncio.sleep(number / 5_000)
            task.cancel()
            await asyncio.wait([task])
            buffer[:] = b"\x02" * len(buffer)
        await pair.link.send(Frame(2, None, pattern(100_000)))
        await pair.far.until(lambda side: side.frames != [] and side.frames[-1].kind == 2)
        assert pair.link.closed is None
    for frame in pair.far.frames[:-1]:
        assert frame.payload is not None
        assert set(bytes(frame.payload)) == {1}


async def test_a_slow_handler_does_not_cost_the_link(carrier: str) -> None:
    options = WireOptions(ping_interval_s=0.02, dead_after_s=0.1)
    release = asyncio.Event()
    async with linked(carrier, options) as pair:

        async def wait(_: Link, __: Frame) -> None:
            await release.wait()

        pair.far.on_frame = wait
        await pair.link.send(Frame(1, None))
        await pair.link.send(Frame(2, None, pattern(200_000)))
        await nap(0.5)
        assert pair.link.closed is None
        assert pair.back.closed is None
        release.set()
        await pair.far.received(2)


async def test_a_peer_that_takes_nothing_ends_the_send(carrier: str) -> None:
    options = WireOptions(
        ping_interval_s=0.02, dead_after_s=0.5, send_deadline_s=0.2, bulk_window_bytes=8 * KIB, small_payload_bytes=16
    )
    async with linked(carrier, options) as pair:

        async def wait(_: Link, __: Frame) -> None:
            await asyncio.Event().wait()

        pair.far.on_frame = wait

        async def flood() -> None:
            for number in range(10):
                await pair.link.send(Frame(1, number, pattern(4 * KIB)))

        with pytest.raises(PeerLost, match=r"far.*took nothing for 0.2 s"):
            await flood()
        await pair.far.until(lambda side: side.lost != [])
        assert "you took nothing for 0.2 s" in pair.far.lost[0][1]


async def test_a_failing_handler_closes_the_link_and_names_the_kind(carrier: str) -> None:
    async with linked(carrier) as pair:

        async def fail(_: Link, __: Frame) -> None:
            raise LookupError("no such sequence")

        pair.far.on_frame = fail
        await pair.link.send(Frame(42, None))
        await pair.near.until(lambda side: side.lost != [])
        assert "42" in pair.near.lost[0][1]
        assert "LookupError" not in pair.near.lost[0][1], "the peer is not told our internals"
        assert "LookupError" in pair.far.lost[0][1]


async def test_both_sides_learn_once_that_a_link_was_closed(carrier: str) -> None:
    async with linked(carrier) as pair:
        link, back = pair.link, pair.back
        await link.close("enough")
        await link.close("again")
        await pair.far.until(lambda side: side.lost != [])
        with pytest.raises(PeerLost, match="enough"):
            await link.send(Frame(1, None))
        with pytest.raises(PeerLost, match="enough"):
            await back.send(Frame(1, None, pattern(100_000)))
        assert "enough" in (link.closed or "")
        assert pair.near_net.links == {}
        assert pair.far_net.links == {}
    assert [peer for peer, _ in pair.near.lost] == ["far"]
    assert [peer for peer, _ in pair.far.lost] == ["near"]


async def test_closing_wakes_every_waiting_sender(carrier: str) -> None:
    async with linked(carrier, OPTIONS) as pair:

        async def wait(_: Link, __: Frame) -> None:
            await asyncio.Event().wait()

        pair.far.on_frame = wait
        link = pair.link
        sends = [asyncio.ensure_future(link.send(Frame(1, None, pattern(size)))) for size in [4000] * 20 + [90_000] * 9]
        await nap()
        await link.close("over")
        results = await asyncio.wait_for(asyncio.gather(*sends, return_exceptions=True), DEADLINE_S)
    lost = [result for result in results if result is not None]
    assert lost
    assert all(isinstance(result, PeerLost) for result in lost)


async def test_what_was_sent_before_a_close_is_delivered(carrier: str) -> None:
    async with linked(carrier) as pair:
        for number in range(50):
            await pair.link.send(Frame(1, number))
        await pair.link.send(Frame(2, None, pattern(300_000)))
        await pair.link.close("done")
        frames = await pair.far.received(51)
        await pair.far.until(lambda side: side.lost != [])
    assert [frame.body for frame in frames if frame.kind == 1] == list(range(50))


async def test_a_handler_may_close_its_own_link(carrier: str) -> None:
    async with linked(carrier) as pair:
        ended = asyncio.Event()

        async def leave(link: Link, _: Frame) -> None:
            await link.close("I do not like this frame")
            ended.set()

        pair.far.on_frame = leave
        await pair.link.send(Frame(1, None))
        await asyncio.wait_for(ended.wait(), DEADLINE_S)
        await pair.near.until(lambda side: side.lost != [])
    assert "do not like" in pair.near.lost[0][1]


async def test_a_handler_may_answer_and_use_timeouts(carrier: str) -> None:
    async with linked(carrier) as pair:

        async def answer(link: Link, frame: Frame) -> None:
            async with asyncio.timeout(5.0), asyncio.TaskGroup() as group:
                group.create_task(link.send(Frame(frame.kind + 1, frame.body, frame.payload)))
            try:
                async with asyncio.timeout(0.01):
                    await asyncio.Event().wait()
            except TimeoutError:
                await link.send(Frame(99, None))

        pair.far.on_frame = answer
        await pair.link.send(Frame(1, "question", pattern(100)))
        frames = await pair.near.received(2)
    assert [(frame.kind, frame.body) for frame in frames] == [(2, "question"), (99, None)]


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        (Frame(-1, None), "negative"),
        (Frame(0x8000, None), "32768"),
        (Frame(5, "x" * 1025), "1025"),
        (Frame(5, list(range(4097))), "4097"),
        (Frame(5, {1: 2}), "key"),
        (Frame(5, [b"x" * 1000] * 66), "kind 5.*65536"),
        (Frame(5, object()), "kind 5"),
        (Frame(5, None, memoryview(bytearray(MIB + 1))), "kind 5.*1048577.*max_frame_bytes"),
        (Frame(5, None, memoryview(bytearray(8))[::2]), "contiguous"),
    ],
)
async def test_frames_that_break_a_limit_are_refused_by_name(carrier: str, frame: Frame, words: str) -> None:
    async with linked(carrier, OPTIONS) as pair:
        with pytest.raises(FrameError, match=f"(?s){words}"):
            await pair.link.send(frame)
        await pair.link.send(Frame(5, None))
        await pair.far.received(1)
        assert pair.link.closed is None


async def test_a_probe_is_bounded_and_says_what_it_sent(carrier: str) -> None:
    async with linked(carrier) as pair:
        measured = await pair.link.probe(MIB, DEADLINE_S)
        assert 64 * KIB <= measured.bytes_sent <= MIB
        assert measured.bandwidth_bytes_per_s > 0
        assert measured.rtt_s >= 0
        with pytest.raises(ValueError, match="65536"):
            await pair.link.probe(1000, DEADLINE_S)
        assert pair.far.frames == []


async def test_counters_count_both_ways(carrier: str) -> None:
    async with linked(carrier) as pair:
        await pair.link.send(Frame(1, None, pattern(100)))
        await pair.link.send(Frame(1, None, pattern(100_000)))
        await pair.far.received(2)
        near, far = pair.near_net.counters[pair.far.name], pair.far_net.counters[pair.near.name]
    assert (near.frames_sent, near.bulk_frames_sent, far.frames_received, far.bulk_frames_received) == (2, 1, 2, 1)
    assert near.bytes_sent >= 100_100
    assert far.bytes_received >= 100_100


async def test_a_second_dial_returns_the_link_that_stands(carrier: str) -> None:
    async with linked(carrier) as pair:
        listener, dialer = (pair.near_net, pair.far_net) if carrier == "listener" else (pair.far_net, pair.near_net)
        host, port = await listener.listen("127.0.0.1", 0)
        again = await dialer.dial(host, port, DEADLINE_S)
        assert again is dialer.links[listener.identity.peer]
        assert len(pair.near.up) == len(pair.far.up) == 1


async def test_closing_an_endpoint_closes_its_links(carrier: str) -> None:
    async with linked(carrier) as pair:
        await pair.near_net.close()
        await pair.near_net.close()
        await pair.far.until(lambda side: side.lost != [])
        assert "near is closing" in pair.far.lost[0][1]
        assert pair.near_net.links == {}


async def test_who_dials_a_daemon_that_is_closing_may_try_again_later(carrier: str) -> None:
    """A coordinator that restarts while a worker joins must not send it away for good."""
    late = Side("late")
    async with linked(carrier) as pair:
        listener: Any = pair.near_net if carrier == "listener" else pair.far_net
        host, port = await listener.listen("127.0.0.1", 0)
        # Who dialed just before the port was closed is still heard.
        await listener.registry.close("going")
        another: Any = late.memory(listener._network) if carrier == "memory" else late.websockets()
        async with another:
            with pytest.raises(PeerLost, match="is closing"):
                await another.dial(host, port, DEADLINE_S)
