"""What an authenticated peer must not say: its link ends with a reason that both are told, and nobody else's does."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import msgpack
import pytest

from helixd.wire.errors import CloseCode
from helixd.wire.link import Frame, Link
from helixd.wire.options import KIB, WireOptions
from helixd.wire.setup import own_grant
from helixd.wire.upkeep import KIND_CREDIT, KIND_PING, KIND_PROBE, KIND_PROBE_TAKEN
from tests.functional.wire_stranger import Address, Stranger, goodbye, stranger
from tests.functional.wire_world import DEADLINE_S, Side

OPTIONS = WireOptions(
    small_payload_bytes=KIB,
    chunk_bytes=4 * KIB,
    max_body_bytes=KIB,
    max_frame_bytes=16 * KIB,
    small_window_bytes=4 * KIB,
    bulk_window_bytes=8 * KIB,
    close_timeout_s=0.1,
)
CONTROL, BULK = False, True


@asynccontextmanager
async def among_friends() -> AsyncIterator[tuple[Side, Address]]:
    """A daemon with an honest link, over which frames flow before and after."""
    far, friend = Side("far"), Side("friend")
    async with far.websockets(OPTIONS) as net, friend.websockets() as theirs:
        address = await net.listen("127.0.0.1", 0)
        link = await theirs.dial(*address, DEADLINE_S)
        await link.send(Frame(70, None))
        yield far, address
        await link.send(Frame(71, None))
        await link.send(Frame(71, None, memoryview(bytes(10_000))))
        await far.until(lambda side: [frame.kind for frame in side.frames].count(71) == 2)
        assert link.closed is None
        assert "friend" not in [peer for peer, _ in far.lost]


def packed(*message: object) -> bytes:
    data: bytes = msgpack.packb(list(message))
    return data


def framed(first: int, payload: bytes, mask: bool = True) -> bytes:
    """A short websocket frame of any sort, under the mask 0."""
    assert len(payload) < 126
    return bytes((first, (0x80 if mask else 0) | len(payload))) + (bytes(4) if mask else b"") + payload


RAW = {
    "text": (framed(0x81, b"hello"), "0x81"),
    "fragment": (framed(0x02, packed(1, None, None)), "0x02"),
    "ping of websockets": (framed(0x89, b""), "0x89"),
    "reserved bit": (framed(0xC2, packed(1, None, None)), "0xc2"),
    "unmasked": (framed(0x82, packed(1, None, None), mask=False) + bytes(8), "masked the wrong way"),
    "too large a message": (
        b"\x82\xff" + (OPTIONS.max_message_bytes + 1).to_bytes(8, "big") + bytes(4),
        f"{OPTIONS.max_message_bytes + 1} bytes exceeds",
    ),
    "a message of 2^63 bytes": (b"\x82\xff" + (2**63).to_bytes(8, "big") + bytes(4), "exceeds"),
}


@pytest.mark.parametrize("bulk", [CONTROL, BULK], ids=["control", "bulk"])
@pytest.mark.parametrize("name", RAW)
async def test_websocket_frames_that_are_not_part_of_the_protocol(name: str, bulk: bool) -> None:
    data, words = RAW[name]
    await thrown_out_for(words, [], bulk, raw=data)


async def thrown_out_for(words: str, messages: list[bytes], bulk: bool, raw: bytes = b"") -> None:
    async with among_friends() as (far, address), stranger(address) as peer:
        for message in messages:
            await peer.say(message, bulk)
        peer.raw(raw, bulk)
        await far.until(lambda side: side.lost != [])
        assert far.lost[0][0] == "stranger"
        assert words in far.lost[0][1]
        code, told = await goodbye(peer.control)
        assert code == CloseCode.NORMAL
        assert told.startswith("you broke the protocol")


SMALL: dict[str, tuple[list[bytes], str]] = {
    "nothing": ([b""], "not a frame"),
    "garbage": ([b"\xc1" * 100], "not a frame"),
    "truncated": ([packed(1, [1, 2, 3], b"payload")[:-3]], "not a frame"),
    "lengthened": ([packed(1, None, None) + b"\x00"], "not a frame"),
    "no list": ([msgpack.packb({"kind": 1})], "not a frame"),
    "an extension": ([packed(1, msgpack.ExtType(1, b"x"), None)], "not a frame"),
    "a deep nest": ([b"\x91" * 1000], "not a frame"),
    "a length that lies": ([b"\xdd\xff\xff\xff\xff"], "not a frame"),
    "a payload that is text": ([packed(1, None, "text")], "not bytes"),
    "too large a payload": ([packed(1, None, bytes(KIB + 1))], "1025"),
    "too large a body": ([packed(1, ["x" * 1000] * 3, None)], "exceeds"),
    "a second setup": ([own_grant(WireOptions()).encode()], "unknown message of kind -1"),
    "an unknown word of links": ([packed(-99, [1], None)], "unknown message of kind -99"),
    "a credit without numbers": ([packed(KIND_CREDIT, None, None)], "must hold integers"),
    "half a credit": ([packed(KIND_CREDIT, [1], None)], "unknown message"),
    "a credit of floats": ([packed(KIND_CREDIT, [1.0, 2.0], None)], "must hold integers"),
    "a credit never taken": ([packed(KIND_CREDIT, [1, 0], None)], "never taken"),
    "a bulk credit never taken": ([packed(KIND_CREDIT, [0, 1], None)], "never taken"),
    "a negative credit": ([packed(KIND_CREDIT, [-5, 0], None)], "never taken"),
    "a probe on the wrong socket": ([packed(KIND_PROBE, [1], None)], "unknown message of kind -5"),
    "a flood of pings": ([packed(KIND_PING, [n], None) for n in range(400)], "pings in"),
}


@pytest.mark.parametrize("name", SMALL)
async def test_control_messages_that_break_the_protocol(name: str) -> None:
    messages, words = SMALL[name]
    await thrown_out_for(words, messages, CONTROL)


LARGE: dict[str, tuple[list[bytes], str]] = {
    "nothing": ([b""], "not a frame"),
    "garbage": ([b"\xc1" * 100], "not a frame"),
    "no payload": ([packed(1, None, 0)], "announces 0 bytes"),
    "less than none": ([packed(1, None, -1)], "announces -1 bytes"),
    "too much": ([packed(1, None, 16 * KIB + 1)], "announces 16385 bytes"),
    "too large a header": ([packed(1, ["x" * 1000] * 2, 5)], "exceeds"),
    "more than announced": ([packed(1, None, 100), bytes(101)], "announced 100 bytes and carries more"),
    "more in the end": ([packed(1, None, 100), bytes(60), bytes(41)], "announced 100 bytes and carries more"),
    "a word of links": ([packed(KIND_PING, [1], 5), bytes(5)], "unknown bulk frame of kind -2"),
    "a probe without a token": ([packed(KIND_PROBE, None, 5), bytes(5)], "unknown bulk frame"),
}


@pytest.mark.parametrize("name", LARGE)
async def test_bulk_messages_that_break_the_protocol(name: str) -> None:
    messages, words = LARGE[name]
    await thrown_out_for(words, messages, BULK)


@pytest.mark.parametrize(
    ("setup", "words"),
    [
        (b"\xc1", "not a frame"),
        (packed(1, [1], None), "must be its setup"),
        (packed(-1, [0] * 6, None), "positive sizes"),
        (packed(-1, [100] * 6, None), "less than a frame needs"),
    ],
)
async def test_a_link_does_not_stand_without_a_setup(setup: bytes, words: str) -> None:
    async with among_friends() as (far, address), stranger(address, setup=setup) as peer:
        code, told = await goodbye(peer.control)
        assert code == CloseCode.BAD_HELLO
        assert words in told
        assert [link.peer for link in far.up] == ["friend"]


async def test_who_sends_no_setup_at_all_is_cut_off() -> None:
    far = Side("far")
    async with far.websockets(WireOptions(auth_timeout_s=0.2, close_timeout_s=0.1)) as net:
        async with stranger(await net.listen("127.0.0.1", 0), setup=b"") as peer:
            assert await goodbye(peer.control) == (None, "")
        assert far.up == []


@pytest.mark.parametrize("bulk", [CONTROL, BULK], ids=["control", "bulk"])
async def test_both_sides_of_the_window(bulk: bool) -> None:
    """While nothing is handled, exactly a window may come."""
    small, large = packed(1, None, bytes(768 - 6)), [packed(1, None, 4 * KIB), bytes(4 * KIB)]
    assert len(small) == 768
    async with among_friends() as (far, address), stranger(address) as peer:

        async def wait(link: Link, _: Frame) -> None:
            if link.peer == "stranger":
                await asyncio.Event().wait()

        far.on_frame = wait
        if bulk:
            for message in large + large:
                await peer.say(message, BULK)
        else:
            # 768 bytes and the overhead of 256 make four of them the window.
            for _ in range(4):
                await peer.say(small)
        await echoed(peer)
        assert far.lost == []
        for message in large[:1] if bulk else [small]:
            await peer.say(message, bulk)
        await far.until(lambda side: side.lost != [])
        assert f"more than its window of {8 * KIB if bulk else 4 * KIB} bytes" in far.lost[0][1]


async def echoed(peer: Stranger) -> None:
    """Everything said on the control socket so far was taken in, and the link stands."""
    await peer.say(packed(KIND_PING, [123456], None))
    async with asyncio.timeout(DEADLINE_S):
        while True:
            message = await peer.control.receive()
            assert message.type is aiohttp.WSMsgType.BINARY, message
            if msgpack.unpackb(message.data)[:2] == [-3, [123456]]:
                return


async def test_what_is_odd_but_harmless_costs_nothing() -> None:
    async with among_friends() as (far, address), stranger(address) as peer:
        peer.raw(framed(0x8A, b"unasked"))
        await peer.say(packed(-3, [5], None))
        await peer.say(packed(KIND_PROBE_TAKEN, [5], None))
        await peer.say(packed(KIND_CREDIT, [0, 0], None))
        for _ in range(20):
            await peer.say(packed(2, None, 8 * KIB), BULK)
            await peer.say(bytes(100), BULK)
            await peer.say(b"", BULK)
        await peer.say(packed(3, None, 10), BULK)
        await peer.say(bytes(10), BULK)
        await far.until(lambda side: 3 in [frame.kind for frame in side.frames])
        await echoed(peer)
        assert 2 not in [frame.kind for frame in far.frames], "frames given up half way reach nobody"
        assert far.lost == []


@pytest.mark.parametrize("bulk", [CONTROL, BULK], ids=["control", "bulk"])
async def test_losing_one_socket_loses_the_link(bulk: bool) -> None:
    async with among_friends() as (far, address), stranger(address) as peer:
        transport = (peer.bulk if bulk else peer.control).transport
        assert transport is not None
        transport.abort()
        await far.until(lambda side: side.lost != [])
        assert "connection lost" in far.lost[0][1]
        assert "bulk" in far.lost[0][1] or not bulk
