"""What each side of a fresh link grants the other: windows and sizes, exchanged once before the first frame.

Each side sends what it is prepared to receive; the other keeps to it, so two daemons with different options understand
each other. The dialer speaks first; the listener answers when its own end of the link stands.
"""

from dataclasses import dataclass

from helixd.wire.errors import FrameError
from helixd.wire.frames import SmallDecoder, encode_small_head
from helixd.wire.options import KIB, WireOptions

KIND_SETUP = -1
_SETUP_BODY_BYTES = 1024


@dataclass(frozen=True, slots=True)
class Grant:
    """What one side may send: credit windows and the largest message of each sort, all in bytes."""

    small_window_bytes: int
    bulk_window_bytes: int
    small_payload_bytes: int
    chunk_bytes: int
    max_body_bytes: int
    max_frame_bytes: int

    def encode(self) -> bytes:
        """The setup message."""
        body = [
            self.small_window_bytes,
            self.bulk_window_bytes,
            self.small_payload_bytes,
            self.chunk_bytes,
            self.max_body_bytes,
            self.max_frame_bytes,
        ]
        return encode_small_head(KIND_SETUP, body, None, _SETUP_BODY_BYTES)

    @classmethod
    def decode(cls, message: bytes | bytearray | memoryview) -> "Grant":
        """Raises FrameError for anything but a setup message with usable numbers."""
        kind, body, _ = SmallDecoder(_SETUP_BODY_BYTES, 0).decode(message)
        if kind != KIND_SETUP or not isinstance(body, list) or len(body) < 6:
            raise FrameError("the first message of a link must be its setup")
        if any(type(value) is not int or not 0 < value < 2**48 for value in body[:6]):
            raise FrameError("a setup message must hold positive sizes")
        grant = cls(*body[:6])
        if min(grant.small_window_bytes, grant.bulk_window_bytes) < 4 * KIB or grant.chunk_bytes < KIB:
            raise FrameError("a setup message grants less than a frame needs")
        return grant


def own_grant(options: WireOptions) -> Grant:
    """What we are prepared to receive."""
    return Grant(
        small_window_bytes=options.small_window_bytes,
        bulk_window_bytes=options.bulk_window_bytes,
        small_payload_bytes=options.small_payload_bytes,
        chunk_bytes=options.chunk_bytes,
        max_body_bytes=options.max_body_bytes,
        max_frame_bytes=options.max_frame_bytes,
    )
