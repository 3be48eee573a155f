"""Who is lost and who is not: silence, cut cables, slow lines, long transfers and busy processes."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import msgpack
import pytest

from helixd.errors import PeerLost
from helixd.wire.link import Frame
from helixd.wire.options import KIB, MIB, WireOptions
from helixd.wire.upkeep import KIND_PING, KIND_PONG
from tests.functional.wire_stranger import Address, stranger
from tests.functional.wire_world import CARRIERS, DEADLINE_S, Pair, Side, linked

OPTIONS = WireOptions(ping_interval_s=0.03, dead_after_s=0.3)


class Cable:
    """A TCP relay between two daemons that can be slow, or cut without either side's socket closing."""

    def __init__(self, target: Address) -> None:
        self._target = target
        self._tasks: set[asyncio.Task[None]] = set()
        self._whole = asyncio.Event()
        self._whole.set()
        self.bytes_per_s = float("inf")

    def cut(self) -> None:
        self._whole.clear()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(*self._target)
        for source, target in ((reader, back), (there, writer)):
            task = asyncio.ensure_future(self._carry(source, target))
            self._tasks.add(task)

    async def _carry(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(16 * KIB):
                await asyncio.sleep(len(data) / self.bytes_per_s)
                await self._whole.wait()
                target.write(data)
                await target.drain()
        finally:
            target.close()

    @asynccontextmanager
    async def laid(self) -> AsyncIterator[Address]:
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        try:
            yield server.sockets[0].getsockname()[:2]
        finally:
            server.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)


@asynccontextmanager
async def over_cable(options: WireOptions) -> AsyncIterator[tuple[Pair, Cable]]:
    near, far = Side("near"), Side("far")
    async with near.websockets(options) as mine, far.websockets(options) as theirs:
        cable = Cable(await theirs.listen("127.0.0.1", 0))
        async with cable.laid() as address:
            await mine.dial(*address, DEADLINE_S)
            yield Pair(near, far, mine, theirs), cable


@contextmanager
def computing() -> Iterator[None]:
    """Another thread that never lets go of the interpreter by itself."""
    over = False

    def work() -> None:
        while not over:
            sum(range(10_000))

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        over = True
        thread.join()


async def test_a_peer_that_says_nothing_is_lost_and_one_that_answers_is_not() -> None:
    far = Side("far")
    async with far.websockets(OPTIONS) as net:
        address = await net.listen("127.0.0.1", 0)
        async with stranger(address, "mute"), stranger(address, "polite") as polite:

            async def answer() -> None:
                async for message in polite.control:
                    kind, body, _ = msgpack.unpackb(message.data)
                    if kind == KIND_PING:
                        await polite.say(msgpack.packb([KIND_PONG, body, None]))

            answering = asyncio.ensure_future(answer())
            await far.until(lambda side: side.lost != [])
            await asyncio.sleep(2 * OPTIONS.dead_after_s)
            answering.cancel()
            assert far.lost == [("mute", "no answer for 0.3 s")]
            rtt_s = net.links[next(link.peer for link in far.up if link.peer == "polite")].rtt_s
            assert rtt_s is not None
            assert 0 < rtt_s < OPTIONS.dead_after_s


async def test_frames_are_as_good_as_answers() -> None:
    """Somebody whose pongs wait behind its own data is alive."""
    far = Side("far")
    async with far.websockets(OPTIONS) as net, stranger(await net.listen("127.0.0.1", 0)) as peer:
        for _ in range(20):
            await peer.say(msgpack.packb([1, None, None]))
            await asyncio.sleep(OPTIONS.dead_after_s / 8)
        assert far.lost == []
        await far.until(lambda side: side.lost != [])


async def test_a_cut_cable_is_noticed_on_both_sides() -> None:
    async with over_cable(OPTIONS) as (pair, cable):
        link = pair.link
        cable.cut()
        await pair.near.until(lambda side: side.lost != [])
        await pair.far.until(lambda side: side.lost != [])
        assert pair.near.lost == [("far", "no answer for 0.3 s")]
        assert pair.far.lost == [("near", "no answer for 0.3 s")]
        with pytest.raises(PeerLost, match=r"far.*no answer"):
            await link.send(Frame(1, None))


async def test_a_transfer_far_longer_than_the_limit_costs_nobody_the_link() -> None:
    async with over_cable(OPTIONS) as (pair, cable):
        cable.bytes_per_s = 4 * MIB
        payload = bytes(range(256)) * (16 * KIB)
        for link in (pair.link, pair.back):
            await link.send(Frame(1, None, memoryview(payload)))
        (there,), (back,) = await pair.far.received(1), await pair.near.received(1)
        assert bytes(there.payload or b"") == bytes(back.payload or b"") == payload
        assert pair.near.lost == pair.far.lost == []
        assert pair.link.rtt_s is not None
        assert pair.link.rtt_s < OPTIONS.dead_after_s, "pings do not wait behind the transfer"


@pytest.mark.parametrize("carrier", CARRIERS)
async def test_a_computing_thread_starves_no_ping(carrier: str) -> None:
    async with linked(carrier, OPTIONS) as pair:
        with computing():
            sent = asyncio.get_running_loop().time()
            number = 0
            while asyncio.get_running_loop().time() - sent < 3 * OPTIONS.dead_after_s:
                await pair.link.send(Frame(1, number, memoryview(bytes(300_000))))
                number += 1
            await pair.far.received(number)
        assert number > 0
        assert pair.near.lost == pair.far.lost == []


@pytest.mark.parametrize("carrier", CARRIERS)
async def test_a_stall_of_the_whole_process_is_nobodys_silence(carrier: str) -> None:
    async with linked(carrier, OPTIONS) as pair:
        for _ in range(2):
            time.sleep(2 * OPTIONS.dead_after_s)  # noqa: ASYNC251
            await pair.link.send(Frame(1, None))
            await asyncio.sleep(3 * OPTIONS.ping_interval_s)
        await pair.far.received(2)
        assert pair.near.lost == pair.far.lost == []


async def test_a_probe_of_a_mute_peer_ends_in_time_and_leaves_the_link() -> None:
    far = Side("far")
    async with far.websockets() as net, stranger(await net.listen("127.0.0.1", 0)):
        link = far.up[0]
        with pytest.raises(PeerLost, match=r"stranger.*did not finish in 0.1 s"):
            await link.probe(64 * KIB, 0.1)
        assert link.closed is None


async def test_a_link_that_is_lost_ends_its_probes() -> None:
    far = Side("far")
    async with far.websockets(OPTIONS) as net, stranger(await net.listen("127.0.0.1", 0)):
        with pytest.raises(PeerLost, match="no answer"):
            await far.up[0].probe(64 * KIB, DEADLINE_S)


async def test_a_probe_measures_the_line_and_not_the_buffers() -> None:
    async with over_cable(WireOptions()) as (pair, cable):
        cable.bytes_per_s = 2 * MIB
        measured = await pair.link.probe(256 * MIB, DEADLINE_S)
        assert measured.bandwidth_bytes_per_s < 1.5 * cable.bytes_per_s
        assert measured.bytes_sent < 2 * MIB, "a slow line costs few bytes"
