"""The codec: frames to bytes and back, with msgpack and hard limits.

A small frame is one msgpack message `[kind, body, payload]`, payload bin or nil. A bulk frame is a msgpack message
`[kind, body, nbytes]`; the payload follows outside msgpack as raw bytes. Kinds of users are `0 <= kind <= MAX_KIND`;
negative kinds belong to the links themselves.

Only FrameError leaves this module, whatever the bytes or the object. What `encode_*` accepts, `decode_*` of a peer
with the same limits accepts. Tuples arrive as lists. Limits: lists of at most 4096 entries, maps of at most 64 with str
keys, strings of at most 1024 bytes, no extension types.
"""

import struct
from typing import Any

import msgpack  # type: ignore[import-untyped]

from helixd.wire.errors import FrameError
from helixd.wire.link import Frame

MAX_KIND = 0x7FFF
MAX_LIST_ENTRIES = 4096
MAX_MAP_ENTRIES = 64
MAX_STR_BYTES = 1024
# A flat list this small cannot break a limit of the decoder, so its encoding need not be tried.
_UNCHECKED_BYTES = 256
_SCALARS = frozenset({int, float, str, bytes, bool, type(None)})
# kind, the message's own array header, nbytes or the bin header.
_ENVELOPE_BYTES = 32

_BIN_16 = struct.Struct("!BH").pack
_BIN_32 = struct.Struct("!BI").pack
# Half the price of Frame(...).
_frame = tuple.__new__
_packer = msgpack.Packer(autoreset=True)


def byte_view(payload: object) -> memoryview:
    """`payload` as a flat view of bytes, not copied. Raises FrameError unless it is a C-contiguous buffer."""
    if type(payload) is memoryview and payload.format == "B" and payload.ndim == 1 and payload.contiguous:
        return payload
    try:
        view = memoryview(payload)  # type: ignore[arg-type]
    except TypeError as error:
        raise FrameError(f"a payload must be a buffer of bytes, not {type(payload).__name__}") from error
    if not view.c_contiguous:
        raise FrameError(f"a payload must be C-contiguous; this one has shape {view.shape} and strides {view.strides}")
    return view.cast("B") if view.nbytes else memoryview(b"")


def encode_small_head(kind: int, body: object, payload: memoryview | None, max_body_bytes: int) -> bytes:
    """One message `[kind, body, payload]` up to its payload, which the caller sends right behind it without a copy.

    Raises FrameError naming what is too large.
    """
    try:
        data: bytes = _packer.pack((kind, body, None))
    except _PACK_ERRORS as error:
        raise _not_packable(kind, error) from error
    flat = _SCALARS.issuperset(map(type, body)) if type(body) is list else _is_flat(body)
    size = len(data)
    if not flat or size > _UNCHECKED_BYTES or size > max_body_bytes or kind > MAX_KIND:
        _check_encoded(kind, body, data, max_body_bytes)
    if payload is None:
        return data
    # In place of the nil: msgpack's bin 8, bin 16 or bin 32.
    size = len(payload)
    if 0x100 <= size < 0x10000:
        return data[:-1] + _BIN_16(0xC5, size)
    return data[:-1] + (bytes((0xC4, size)) if size < 0x100 else _BIN_32(0xC6, size))


def encode_bulk_header(kind: int, body: object, payload_bytes: int, max_body_bytes: int) -> bytes:
    """The message `[kind, body, payload_bytes]` that announces a payload sent outside msgpack. Raises FrameError."""
    data = _pack((kind, body, payload_bytes))
    _check_encoded(kind, body, data, max_body_bytes)
    return data


class SmallDecoder:
    """Decodes one small message after another. It keeps its unpacker, since giving one its limits costs more than
    unpacking a message."""

    __slots__ = (
        "_feed",
        "_max_body_bytes",
        "_max_bytes",
        "_max_payload_bytes",
        "_read_bytes",
        "_unpack",
    )

    def __init__(self, max_body_bytes: int, max_payload_bytes: int) -> None:
        self._max_body_bytes = max_body_bytes
        self._max_payload_bytes = max_payload_bytes
        self._max_bytes = max_body_bytes + max_payload_bytes + _ENVELOPE_BYTES
        self._renew()

    def _renew(self) -> None:
        limit = max(self._max_body_bytes, self._max_payload_bytes)
        unpacker = msgpack.Unpacker(max_bin_len=limit, max_buffer_size=2 * self._max_bytes, **_LIMITS)
        self._feed, self._unpack, self._read_bytes = unpacker.feed, unpacker.unpack, unpacker.read_bytes

    def decode(self, data: bytes | bytearray | memoryview) -> Frame:
        """One message; its payload is owned, writable memory. Raises FrameError."""
        if len(data) > self._max_bytes:
            raise FrameError(
                f"a small frame of {len(data)} bytes exceeds {self._max_body_bytes} + {self._max_payload_bytes}"
            )
        try:
            self._feed(data)
            kind, body, payload = self._unpack()
            if self._read_bytes(1):
                raise ValueError("bytes after its end")
        except _UNPACK_ERRORS as error:
            self._renew()
            raise _not_a_frame(error) from error
        if type(kind) is not int or not -MAX_KIND <= kind <= MAX_KIND:
            raise FrameError("not a frame: its kind must be a small integer")
        if payload is None:
            return _frame(Frame, (kind, body, None))
        if type(payload) is not bytes:
            raise FrameError(f"the payload of kind {kind} is {type(payload).__name__}, not bytes")
        if len(payload) > self._max_payload_bytes:
            raise FrameError(f"a small payload of {len(payload)} bytes exceeds {self._max_payload_bytes}")
        return _frame(Frame, (kind, body, memoryview(bytearray(payload))))


def decode_bulk_header(
    data: bytes | bytearray | memoryview, max_body_bytes: int, max_frame_bytes: int
) -> tuple[int, object, int]:
    """`(kind, body, payload_bytes)` of a bulk header, `1 <= payload_bytes <= max_frame_bytes`. Raises FrameError."""
    if len(data) > max_body_bytes + _ENVELOPE_BYTES:
        raise FrameError(f"a bulk header of {len(data)} bytes exceeds {max_body_bytes}")
    kind, body, payload_bytes = _unpack(data, max_body_bytes)
    if type(payload_bytes) is not int or not 1 <= payload_bytes <= max_frame_bytes:
        raise FrameError(f"a bulk frame of kind {kind} announces {payload_bytes!r} bytes, allowed 1..{max_frame_bytes}")
    return kind, body, payload_bytes


_PACK_ERRORS = (ValueError, TypeError, OverflowError, RecursionError, BufferError)


def _not_packable(kind: object, error: Exception) -> FrameError:
    _packer.reset()
    return FrameError(f"a frame of kind {kind!r} cannot be encoded: {error}")


def _pack(message: tuple[object, object, object]) -> bytes:
    try:
        data: bytes = _packer.pack(message)
    except _PACK_ERRORS as error:
        raise _not_packable(message[0], error) from error
    return data


def _check_encoded(kind: int, body: object, data: bytes, max_body_bytes: int) -> None:
    if kind > MAX_KIND:
        raise FrameError(f"frame kind {kind} is above {MAX_KIND}")
    if len(data) > max_body_bytes:
        raise FrameError(
            f"the body of a frame of kind {kind} is {len(data)} bytes, at most {max_body_bytes} are allowed; "
            "put large data into the payload"
        )
    _unpack(data, max_body_bytes)


def _is_flat(body: object) -> bool:
    if type(body) is tuple:
        return _SCALARS.issuperset(map(type, body))
    return type(body) in _SCALARS


def _refuse_extension(code: int, data: bytes) -> object:
    raise FrameError(f"msgpack extension type {code} ({len(data)} bytes) is not part of the protocol")


_LIMITS: dict[str, Any] = {
    "raw": False,
    "strict_map_key": True,
    "max_array_len": MAX_LIST_ENTRIES,
    "max_map_len": MAX_MAP_ENTRIES,
    "max_str_len": MAX_STR_BYTES,
    "max_ext_len": 0,
    "ext_hook": _refuse_extension,
}

# Every family of errors msgpack is known to raise, and those of taking three values out of what it returned.
_UNPACK_ERRORS = (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException)


def _not_a_frame(error: Exception) -> FrameError:
    return FrameError(f"not a frame: {type(error).__name__}: {str(error)[:200]}")


def _unpack(data: bytes | bytearray | memoryview, max_bin_bytes: int) -> tuple[int, object, object]:
    try:
        message = msgpack.unpackb(data, max_bin_len=max_bin_bytes, **_LIMITS)
        if type(message) is not list:
            raise TypeError(f"a {type(message).__name__}")
        kind, body, last = message
    except _UNPACK_ERRORS as error:
        raise _not_a_frame(error) from error
    if type(kind) is not int or not -MAX_KIND <= kind <= MAX_KIND:
        raise FrameError("not a frame: its kind must be a small integer")
    return kind, body, last


def check_payload(kind: int, payload_bytes: int, limit_bytes: int, peer: str) -> None:
    """Refuse to send more than the peer accepts in one frame. Raises FrameError."""
    if payload_bytes > limit_bytes:
        raise FrameError(
            f"a frame of kind {kind} with {payload_bytes} bytes exceeds what {peer} accepts, "
            f"{limit_bytes} (max_frame_bytes); send it in parts"
        )


def integers(kind: int, body: object) -> list[int]:
    """The body of a message of the link itself: one integer or more. Raises FrameError."""
    if not isinstance(body, list) or not body or any(type(number) is not int for number in body):
        raise FrameError(f"a message of kind {kind} must hold integers")
    return body
