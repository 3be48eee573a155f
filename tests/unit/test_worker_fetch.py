"""Tensors in pieces that suit the line: whole and in order on a fast one, before every deadline on a slow one."""

import asyncio
import math
from typing import cast

import pytest

from helixd.coordinator.weights import MAX_PIECE_BYTES
from helixd.errors import ModelError, PeerLost
from helixd.ids import PeerId
from helixd.protocol.codec import from_frame
from helixd.protocol.messages import Fetch, Fetched
from helixd.wire.link import Frame, Link
from helixd.worker.fetch import FIRST_PIECE_BYTES, LEAST_PIECE_BYTES, MOST_PIECE_BYTES, TensorFetcher

TIMEOUT_S = 30.0


class Line:
    """A coordinator that has one tensor of bytes, behind a line that carries `bytes_per_s`; its clock is its own."""

    peer = PeerId("hub")

    def __init__(self, size: int, bytes_per_s: float = math.inf) -> None:
        self.data = bytes(n % 251 for n in range(1 << 12)) * -(-size // (1 << 12))
        self.data = self.data[:size]
        self.bytes_per_s = bytes_per_s
        self.now_s = 0.0
        self.pieces: list[tuple[int, float]] = []
        self.error = ""
        self.silent = False
        self.fetcher = TensorFetcher(cast(Link, self), TIMEOUT_S, lambda: self.now_s)

    async def send(self, frame: Frame) -> None:
        asked = from_frame(frame)
        assert isinstance(asked, Fetch)
        if self.silent:
            return
        piece = self.data[asked.offset : asked.offset + min(asked.length, MAX_PIECE_BYTES)]
        took_s = len(piece) / self.bytes_per_s
        self.pieces.append((len(piece), took_s))
        self.now_s += took_s
        answer = Fetched(asked.request, "bfloat16", [len(self.data) // 2], self.error)
        asyncio.get_running_loop().call_soon(self.fetcher.on_fetched, answer, memoryview(piece))


async def test_a_fast_line_soon_carries_large_pieces() -> None:
    line = Line(50 << 20, 1e9)
    found = await line.fetcher.fetch("w")
    assert bytes(found.data) == line.data
    assert (found.dtype, found.shape) == ("bfloat16", (len(line.data) // 2,))
    sizes = [size for size, _ in line.pieces]
    assert sizes[:5] == [1 << 20, 2 << 20, 4 << 20, 8 << 20, 8 << 20]
    assert max(sizes) == MOST_PIECE_BYTES <= MAX_PIECE_BYTES


@pytest.mark.parametrize("bytes_per_s", [1e4, 4e4, 1e6])
async def test_on_a_slow_line_no_piece_comes_near_its_deadline_once_the_line_is_known(bytes_per_s: float) -> None:
    line = Line(12 << 20, bytes_per_s)
    found = await line.fetcher.fetch("w")
    assert bytes(found.data) == line.data
    settled = [took_s for size, took_s in line.pieces[4:] if size > LEAST_PIECE_BYTES]
    assert all(took_s < TIMEOUT_S / 3 for took_s in settled)
    assert min(size for size, _ in line.pieces[:-1]) >= LEAST_PIECE_BYTES
    # The next tensor starts from what is known.
    count = len(line.pieces)
    await line.fetcher.fetch("w")
    assert line.pieces[count][0] == line.pieces[count - 2][0]


async def test_what_goes_wrong_names_the_tensor() -> None:
    line = Line(1 << 20)
    line.error = "no tensor w"
    with pytest.raises(ModelError, match="tensor w: the coordinator says: no tensor w"):
        await line.fetcher.fetch("w")
    silent = Line(1 << 20)
    silent.silent = True
    silent.fetcher = TensorFetcher(cast(Link, silent), 0.01)
    with pytest.raises(PeerLost, match=r"hub.* tensor w within 0.01 s"):
        await silent.fetcher.fetch("w")


async def test_after_a_deadline_that_was_missed_less_is_asked_for() -> None:
    line = Line(1 << 20)
    line.silent = True
    line.fetcher = TensorFetcher(cast(Link, line), 0.01, lambda: line.now_s)
    with pytest.raises(PeerLost):
        await line.fetcher.fetch("w")
    line.silent = False
    await line.fetcher.fetch("w")
    assert line.pieces[0][0] == FIRST_PIECE_BYTES // 2


@pytest.mark.parametrize("size", [0, 3 << 20])
async def test_pieces_that_do_not_fit_are_refused(size: int) -> None:
    line = Line(1 << 20)
    line.data = bytes(size)
    answer = Fetched(1, "bfloat16", [1 << 19], "")
    asked = asyncio.ensure_future(line.fetcher._ask("w", 0))
    await asyncio.sleep(0)
    line.fetcher.on_fetched(answer, memoryview(bytes(size)))
    message, payload = await asked
    assert message == answer
    with pytest.raises(ModelError, match=f"tensor w: got {size} bytes at 0 of {1 << 20}"):
        line.fetcher._place("w", bytearray(1 << 20), 0, payload)
