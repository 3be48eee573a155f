"""Messages to frames and back. Decoding checks every field's type; nothing but ProtocolError escapes.

Knows the message types and the frame seam, not who sends what when.
"""

import sys
from array import array
from collections.abc import Sequence
from typing import Any, TypeVar

import msgspec

from helixd.errors import HelixError
from helixd.protocol import messages
from helixd.protocol.messages import Message
from helixd.wire.link import Frame

M = TypeVar("M", bound=Message)


class ProtocolError(HelixError):
    """A peer sent a message that no version we speak would send. Close its link; it cannot be understood."""


MESSAGE_TYPES: dict[int, type[Message]] = {
    cls.KIND: cls
    for cls in vars(messages).values()
    if isinstance(cls, type) and issubclass(cls, Message) and cls is not Message
}


def to_frame(message: Message, payload: memoryview | None = None) -> Frame:
    """The frame that carries `message`, with `payload` beside it."""
    return Frame(message.KIND, msgspec.to_builtins(message, builtin_types=(bytes,)), payload)


def from_frame(frame: Frame) -> Message:
    """The message in `frame`, fully checked (its payload stays in the frame).

    Raises ProtocolError naming the kind and the field that is wrong.
    """
    cls = MESSAGE_TYPES.get(frame.kind)
    if cls is None:
        raise ProtocolError(f"unknown message kind {frame.kind}; the peer may run a newer helixd")
    try:
        body: Any = frame.body
        return msgspec.convert(body, type=cls)
    except (msgspec.ValidationError, ValueError, TypeError, OverflowError) as error:
        raise ProtocolError(f"bad {cls.__name__} message: {error}") from error


def pack_ids(ids: Sequence[int]) -> memoryview:
    """Token ids as a payload: int32, little-endian."""
    packed = array("i", ids)
    if sys.byteorder == "big":
        packed.byteswap()
    return memoryview(packed).cast("B")


def unpack_ids(payload: memoryview | None) -> tuple[int, ...]:
    """The ids of a payload made by `pack_ids`; an absent payload is no ids. Raises ProtocolError for a torn one."""
    if payload is None:
        return ()
    if len(payload) % 4:
        raise ProtocolError(f"a payload of token ids has {len(payload)} bytes, not a multiple of 4")
    ids = array("i", bytes(payload))
    if sys.byteorder == "big":
        ids.byteswap()
    return tuple(ids)
