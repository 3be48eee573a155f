"""The codec: what is encoded comes back as it was, and whatever else comes is a FrameError and nothing worse."""

import contextlib

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helixd.wire.errors import FrameError
from helixd.wire.frames import (
    MAX_KIND,
    MAX_LIST_ENTRIES,
    MAX_MAP_ENTRIES,
    MAX_STR_BYTES,
    SmallDecoder,
    byte_view,
    decode_bulk_header,
    encode_bulk_header,
    encode_small_head,
)
from helixd.wire.options import WireOptions
from helixd.wire.setup import KIND_SETUP, Grant, own_grant

BODY, PAYLOAD, FRAME = 4096, 2048, 1 << 20


def encode_small(kind: int, body: object, payload: memoryview | None, max_body_bytes: int) -> bytes:
    """The whole message."""
    data = encode_small_head(kind, body, payload, max_body_bytes) + (payload or b"")
    assert data == msgpack.packb([kind, body, payload])
    return data


def decode_small(data: bytes, max_body_bytes: int, max_payload_bytes: int) -> tuple[int, object, memoryview | None]:
    """Refused messages leave no trace in a decoder."""
    decoder = SmallDecoder(max_body_bytes, max_payload_bytes)
    for _ in range(2):
        with contextlib.suppress(FrameError):
            decoder.decode(data)
    assert decoder.decode(b"\x93\x05\xc0\xc0") == (5, None, None)
    return decoder.decode(data)


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=40)
    | st.binary(max_size=80)
)
BODIES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=8), inner, max_size=6),
    max_leaves=8,
)


@settings(max_examples=80, deadline=None)
@given(st.integers(-MAX_KIND, MAX_KIND), BODIES, st.none() | st.binary(max_size=PAYLOAD))
def test_small_frames_come_back_as_they_were(kind: int, body: object, payload: bytes | None) -> None:
    view = None if payload is None else memoryview(payload)
    decoded = decode_small(encode_small(kind, body, view, BODY), BODY, PAYLOAD)
    assert decoded[:2] == (kind, body)
    assert (None if decoded[2] is None else bytes(decoded[2])) == payload


@settings(max_examples=40, deadline=None)
@given(st.integers(0, MAX_KIND), BODIES, st.integers(1, FRAME))
def test_bulk_headers_come_back_as_they_were(kind: int, body: object, size: int) -> None:
    assert decode_bulk_header(encode_bulk_header(kind, body, size, BODY), BODY, FRAME) == (kind, body, size)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=300) | BODIES.map(msgpack.packb))
def test_any_bytes_decode_or_are_a_frame_error(data: bytes) -> None:
    for decode in (
        lambda: decode_small(data, BODY, PAYLOAD),
        lambda: decode_bulk_header(data, BODY, FRAME),
        lambda: Grant.decode(data),
    ):
        with contextlib.suppress(FrameError):
            decode()


@settings(max_examples=40, deadline=None)
@given(BODIES, st.binary(max_size=64), st.data())
def test_a_truncated_or_lengthened_frame_is_refused(body: object, payload: bytes, data: st.DataObject) -> None:
    whole = encode_small(3, body, memoryview(payload), BODY)
    with pytest.raises(FrameError):
        decode_small(whole[: data.draw(st.integers(0, len(whole) - 1))], BODY, PAYLOAD)
    with pytest.raises(FrameError):
        decode_small(whole + b"\x00", BODY, PAYLOAD)


@pytest.mark.parametrize(
    ("fits", "breaks"),
    [
        ([0] * MAX_LIST_ENTRIES, [0] * (MAX_LIST_ENTRIES + 1)),
        ({str(key): 0 for key in range(MAX_MAP_ENTRIES)}, {str(key): 0 for key in range(MAX_MAP_ENTRIES + 1)}),
        ("x" * MAX_STR_BYTES, "x" * (MAX_STR_BYTES + 1)),
        ("é" * (MAX_STR_BYTES // 2), "é" * (MAX_STR_BYTES // 2 + 1)),
        ([[b"x" * 4000]], [[b"x" * 4100]]),
        (2**64 - 1, 2**64),
        (-(2**63), -(2**63) - 1),
    ],
)
def test_both_sides_of_every_limit_of_a_body(fits: object, breaks: object) -> None:
    room = 3 * BODY
    assert decode_small(encode_small(1, fits, None, room), room, PAYLOAD)[1] == fits
    limit = room if not isinstance(breaks, list) or isinstance(breaks[0], int) else BODY
    with pytest.raises(FrameError, match=r"kind 1|not a frame"):
        encode_small(1, breaks, None, limit)


@pytest.mark.parametrize("limit", [64, BODY])
@pytest.mark.parametrize("with_payload", [False, True])
def test_the_largest_body_is_the_same_for_both_sides(with_payload: bool, limit: int) -> None:
    payload = memoryview(bytes(PAYLOAD)) if with_payload else None
    body = b"x" * BODY
    around = len(msgpack.packb([1, body[: limit - 10], None])) - (limit - 10)
    largest = limit - around
    assert decode_small(encode_small(1, body[:largest], payload, limit), limit, PAYLOAD)[1] == body[:largest]
    with pytest.raises(FrameError, match=f"at most {limit}"):
        encode_small(1, body[:largest] + b"x", payload, limit)


def test_both_sides_of_the_payload_limit_and_of_the_kind() -> None:
    data = encode_small(MAX_KIND, None, memoryview(bytes(PAYLOAD)), BODY)
    assert decode_small(data, BODY, PAYLOAD)[0] == MAX_KIND
    with pytest.raises(FrameError, match=f"{PAYLOAD + 1} bytes exceeds {PAYLOAD}"):
        decode_small(encode_small(1, None, memoryview(bytes(PAYLOAD + 1)), BODY), BODY, PAYLOAD)
    with pytest.raises(FrameError, match=str(MAX_KIND + 1)):
        encode_small(MAX_KIND + 1, None, None, BODY)
    for size in (1, FRAME):
        assert decode_bulk_header(msgpack.packb([1, None, size]), BODY, FRAME)[2] == size
    for size in (0, -1, FRAME + 1, 1.0, None, True):
        with pytest.raises(FrameError, match=r"1\.\."):
            decode_bulk_header(msgpack.packb([1, None, size]), BODY, FRAME)


@pytest.mark.parametrize(
    "message",
    [
        None,
        7,
        [],
        [1],
        [1, None],
        [1, None, None, None],
        {"kind": 1},
        ["1", None, None],
        [True, None, None],
        [1.0, None, None],
        [MAX_KIND + 1, None, None],
        [-MAX_KIND - 1, None, None],
        [1, None, "text"],
        [1, None, 5],
        [1, {1: 2}, None],
        [1, msgpack.ExtType(5, b"code"), None],
        [1, msgpack.Timestamp(1), None],
    ],
)
def test_messages_that_are_no_frames(message: object) -> None:
    with pytest.raises(FrameError):
        decode_small(msgpack.packb(message), BODY, PAYLOAD)


def test_nesting_without_end_is_refused() -> None:
    with pytest.raises(FrameError):
        decode_small(b"\x91" * (BODY - 1) + b"\xc0", BODY, PAYLOAD)
    endless: list[object] = []
    endless.append(endless)
    with pytest.raises(FrameError):
        encode_small(1, endless, None, BODY)
    assert decode_small(encode_small(1, [2], None, BODY), BODY, PAYLOAD)[1] == [2], "the packer is clean again"


def test_a_payload_is_a_flat_view_of_the_same_memory() -> None:
    memory = bytearray(8)
    view = byte_view(memoryview(memory).cast("H"))
    memory[0] = 9
    assert (view[0], view.nbytes, view.format) == (9, 8, "B")
    assert byte_view(memoryview(b"").cast("H")).nbytes == 0
    for bad in ("text", 5, memoryview(memory)[::2]):
        with pytest.raises(FrameError):
            byte_view(bad)


def test_a_grant_comes_back_and_nonsense_does_not_pass_for_one() -> None:
    grant = own_grant(WireOptions())
    assert Grant.decode(grant.encode()) == grant
    numbers = [getattr(grant, name) for name in grant.__slots__]
    for at in range(len(numbers)):
        for wrong in (0, -1, 2**48, 1.5, "8", None, True):
            with pytest.raises(FrameError):
                Grant.decode(msgpack.packb([KIND_SETUP, [*numbers[:at], wrong, *numbers[at + 1 :]], None]))
    for at, (fits, breaks) in {0: (4096, 4095), 1: (4096, 4095), 3: (1024, 1023)}.items():
        Grant.decode(msgpack.packb([KIND_SETUP, [*numbers[:at], fits, *numbers[at + 1 :]], None]))
        with pytest.raises(FrameError, match="less than a frame needs"):
            Grant.decode(msgpack.packb([KIND_SETUP, [*numbers[:at], breaks, *numbers[at + 1 :]], None]))
    Grant.decode(msgpack.packb([KIND_SETUP, [*numbers, "of a newer version"], None]))
    with pytest.raises(FrameError, match="setup"):
        Grant.decode(msgpack.packb([KIND_SETUP - 1, numbers, None]))
