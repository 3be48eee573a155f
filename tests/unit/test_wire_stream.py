"""The websocket framing over an invented transport: any cut of the bytes gives the same messages; nonsense ends it."""

import asyncio
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helixd.wire.errors import FrameError
from helixd.wire.stream import MessageStream

LIMIT, AHEAD = 70_000, 512
# Lengths around every form a header can have, and around the limits of this stream.
SIZES = st.sampled_from([0, 1, 3, 4, 125, 126, 127, 500, 511, 512, 513, 4000, 65_535, 65_536, LIMIT])


class Wire(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.protocol: asyncio.BaseProtocol = asyncio.Protocol()
        self.written = bytearray()
        self.limits: list[int | None] = []
        self.reading = True
        self.ended = False

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self.protocol

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self.protocol = protocol

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += data

    def writelines(self, data: Iterable[bytes | bytearray | memoryview]) -> None:
        for each in data:
            self.write(each)

    def is_closing(self) -> bool:
        return self.ended

    def abort(self) -> None:
        self.ended = True

    def get_write_buffer_size(self) -> int:
        return 0


class Sink:
    """Takes messages down; those of `placed_bytes` and more in places of their own."""

    def __init__(self, placed_bytes: int | None) -> None:
        self.placed_bytes = placed_bytes
        self.messages: list[bytes] = []
        self.goodbye: tuple[int, str] | None = None
        self.error: FrameError | None = None
        self.ends = 0
        self._open: memoryview | None = None

    def place(self, size_bytes: int) -> memoryview | None:
        if self.placed_bytes is None or size_bytes < max(1, self.placed_bytes):
            return None
        self._open = memoryview(bytearray(size_bytes))
        return self._open

    def placed(self) -> None:
        assert self._open is not None
        self.messages.append(bytes(self._open))
        self._open = None

    def message(self, data: memoryview | bytearray) -> None:
        self.messages.append(bytes(data))

    def closing(self, code: int, reason: str) -> None:
        self.goodbye = (code, reason)

    def broken(self, error: FrameError) -> None:
        assert self.error is None
        self.error = error

    def ended(self, error: Exception | None) -> None:
        self.ends += 1


def stream(dialed: bool, places: bool = False) -> tuple[Wire, MessageStream]:
    wire = Wire()
    return wire, MessageStream(wire, dialed, LIMIT, AHEAD, places)


def feed(receiver: MessageStream, data: bytes, cuts: Iterable[int] = ()) -> None:
    """As a transport does: never more at once than the buffer offered, and never across a cut."""
    edges = iter(sorted(cut for cut in cuts if cut < len(data)))
    edge, at = next(edges, len(data)), 0
    while at < len(data):
        while edge <= at:
            edge = next(edges, len(data))
        buffer = receiver.get_buffer(-1)
        assert len(buffer) > 0
        count = min(len(buffer), edge - at)
        buffer[:count] = data[at : at + count]
        receiver.buffer_updated(count)
        at += count


def patterned(size: int, seed: int) -> bytes:
    return bytes((seed + at * 7) & 0xFF for at in range(min(size, 1000))) * (size // 1000 + 1)


@settings(max_examples=60, deadline=None)
@given(st.booleans(), st.none() | st.sampled_from([0, 100, 4000]), st.lists(SIZES, max_size=6), st.data())
def test_any_cut_of_the_bytes_gives_the_same_messages(
    dialed: bool, placed_bytes: int | None, sizes: list[int], data: st.DataObject
) -> None:
    wire, sender = stream(dialed)
    messages = [patterned(size, seed)[:size] for seed, size in enumerate(sizes)]
    for message in messages:
        sender.write(memoryview(message))
    sender.write_close(4000, "bye")
    cuts = data.draw(st.lists(st.integers(0, len(wire.written)), max_size=12))
    _, receiver = stream(not dialed, placed_bytes is not None)
    sink = Sink(placed_bytes)
    receiver.start(sink)
    feed(receiver, bytes(wire.written), cuts)
    assert sink.messages == messages
    assert sink.goodbye == (4000, "bye")
    assert sink.error is None


STARTS = st.sampled_from(
    [b"\x82", b"\x82\x80", b"\x82\x05", b"\x82\xfe\x00", b"\x88\x82", b"\x8a\x80", b"\x82\xff", b""]
)


@settings(max_examples=100, deadline=None)
@given(st.booleans(), st.booleans(), st.lists(STARTS | st.binary(max_size=40), max_size=8))
def test_any_bytes_are_messages_or_one_error(dialed: bool, places: bool, pieces: list[bytes]) -> None:
    _, receiver = stream(dialed, places)
    sink = Sink(5 if places else None)
    receiver.start(sink)
    for piece in pieces:
        feed(receiver, piece)
    assert sink.error is None or "internal" not in str(sink.error)
    assert sum(map(len, sink.messages)) <= sum(map(len, pieces))


def masked(first: int, payload: bytes = b"", length: bytes | None = None) -> bytes:
    """A client's frame with the mask 0; `length` replaces its second byte and what extends it."""
    return bytes((first,)) + (bytes((0x80 | len(payload),)) if length is None else length) + bytes(4) + payload


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (masked(0x81, b"text"), "0x81"),
        (masked(0x02, b"first part"), "0x02"),
        (masked(0x80, b"last part"), "0x80"),
        (masked(0xC2, b"compressed"), "0xc2"),
        (masked(0x92, b"reserved"), "0x92"),
        (masked(0x89, b"ping"), "0x89"),
        (masked(0x83, b"unknown"), "0x83"),
        (b"\x82\x03abc" + bytes(8), "masked the wrong way"),
        (masked(0x82, length=b"\xff" + (LIMIT + 1).to_bytes(8, "big")), f"{LIMIT + 1} bytes.*{LIMIT}"),
        (masked(0x82, length=b"\xff" + (2**64 - 1).to_bytes(8, "big")), "exceeds"),
        (masked(0x8A, length=b"\xfe" + (126).to_bytes(2, "big")), "126 bytes.*125"),
        (masked(0x88, length=b"\xfe" + (126).to_bytes(2, "big")), "126 bytes.*125"),
    ],
)
@pytest.mark.parametrize("places", [False, True])
def test_what_peers_never_send_ends_the_stream(data: bytes, words: str, places: bool) -> None:
    _, receiver = stream(dialed=False, places=places)
    sink = Sink(1 if places else None)
    receiver.start(sink)
    feed(receiver, masked(0x82, b"good") + data + masked(0x82, b"after"))
    assert sink.messages == [b"good"]
    with pytest.raises(FrameError, match=words):
        raise sink.error or AssertionError("not refused")


def test_an_unasked_pong_is_passed_over_and_an_empty_close_has_no_code() -> None:
    _, receiver = stream(dialed=False)
    sink = Sink(None)
    receiver.start(sink)
    feed(receiver, masked(0x8A, b"x" * 125) + masked(0x82, b"good") + masked(0x88) + masked(0x82, b"after"))
    assert sink.messages == [b"good"]
    assert sink.goodbye == (0, "")


def test_a_masked_frame_from_a_listener_is_refused() -> None:
    _, receiver = stream(dialed=True)
    sink = Sink(None)
    receiver.start(sink)
    feed(receiver, masked(0x82, b"good"))
    assert "masked the wrong way" in str(sink.error)


def test_masks_are_not_predictable() -> None:
    wire, sender = stream(dialed=True)
    for _ in range(3000):
        sender.write(b"")
    masks = {bytes(wire.written[at + 2 : at + 6]) for at in range(0, len(wire.written), 6)}
    assert len(masks) > 2990


def test_a_long_reason_is_cut_between_characters() -> None:
    wire, sender = stream(dialed=False)
    sender.write_close(4000, "x" + "é" * 100)
    _, receiver = stream(dialed=True)
    sink = Sink(None)
    receiver.start(sink)
    feed(receiver, bytes(wire.written))
    assert sink.goodbye is not None
    assert set(sink.goodbye[1][1:]) == {"é"}


def test_an_error_of_the_sink_ends_the_stream_and_not_the_loop() -> None:
    class Failing(Sink):
        def message(self, data: memoryview | bytearray) -> None:
            raise LookupError("a mistake of ours")

    _, receiver = stream(dialed=False)
    sink = Failing(None)
    receiver.start(sink)
    feed(receiver, masked(0x82, b"good") * 2)
    assert "a mistake of ours" in str(sink.error)


def test_nothing_is_written_or_delivered_once_it_is_over() -> None:
    wire, both = stream(dialed=False)
    assert not wire.reading, "the peer's first words wait until somebody listens"
    sink = Sink(None)
    both.start(sink)
    assert wire.reading
    both.stop()
    feed(both, masked(0x82, b"late"))
    both.abort()
    with pytest.raises(ConnectionError):
        both.write(b"late")
    both.connection_lost(None)
    late = Sink(None)
    both.start(late)
    assert (sink.messages, sink.ends, late.ends) == ([], 1, 1)


async def test_a_gone_connection_ends_the_wait_for_it() -> None:
    _, sender = stream(dialed=False)
    sender.pause_writing()
    waiting = asyncio.ensure_future(sender.drain())
    await asyncio.sleep(0)
    assert not waiting.done()
    sender.connection_lost(ConnectionResetError("cut"))
    with pytest.raises(ConnectionError):
        await waiting
