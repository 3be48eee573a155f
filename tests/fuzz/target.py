"""What a stranger's bytes reach first, as one function of bytes: hello, setup, small frames, bulk headers.

Fed by coverage-guided fuzzing (`tests/fuzz/frames.py`) and, always, by Hypothesis (`tests/unit/test_fuzz_frames.py`).
"""

from helixd.ids import Incarnation, PeerId
from helixd.protocol import messages as m
from helixd.protocol.codec import ProtocolError, from_frame, to_frame
from helixd.wire.errors import FrameError
from helixd.wire.frames import SmallDecoder, decode_bulk_header, encode_bulk_header, encode_small_head
from helixd.wire.handshake import HandshakeFailed, Hello, Purpose
from helixd.wire.link import Frame
from helixd.wire.options import WireOptions
from helixd.wire.peers import PeerIdentity
from helixd.wire.setup import Grant, own_grant

BODY_BYTES, PAYLOAD_BYTES, FRAME_BYTES = 64 << 10, 256 << 10, 256 << 20
SMALL, BULK, HELLO, SETUP = b"\x00", b"\x40", b"\x80", b"\xc0"
_decoder = SmallDecoder(BODY_BYTES, PAYLOAD_BYTES)


def one_input(data: bytes) -> None:
    """The first byte chooses which decoder gets the rest. Returns for what is refused as it should be."""
    kind, rest = data[:1], data[1:]
    try:
        if kind < BULK:
            frame = _decoder.decode(rest)
            assert frame.payload is None or len(frame.payload) <= len(rest)
            from_frame(frame)
        elif kind < HELLO:
            number, body, size = decode_bulk_header(rest, BODY_BYTES, FRAME_BYTES)
            assert 0 <= size <= FRAME_BYTES
            from_frame(Frame(number, body))
        elif kind < SETUP:
            hello = Hello.decode(rest)
            assert Hello.decode(hello.encode()) == hello
        else:
            Grant.decode(rest)
    except (FrameError, HandshakeFailed, ProtocolError):
        return


def seeds() -> list[bytes]:
    """Sound messages for each decoder."""
    hello = Hello(PeerIdentity(PeerId("p"), Incarnation(1), bytes(16)), Purpose.CONTROL, bytes(16), bytes(32))
    frames = [
        to_frame(m.Hello(2, [m.NodeHardware("n", "cpu", "x", 10, 5)], "f", "", 7071, "0.1", "g", [("n", 0, 3)])),
        to_frame(m.Tokens("n", [m.Drawn(1, 2, 3, 4, -0.5, [(1, -1.0)])])),
        to_frame(m.Activations(1, 2, "n", [m.Part(1, 0, 5, 4, 1, True)])),
        to_frame(m.EpochPush(3, [m.Assignment("n", "p", 0, 3, 9, [("", 1.0)])], [m.PeerAddress("p", "h", 1, True)])),
    ]
    small = [SMALL + encode_small_head(frame.kind, frame.body, None, 4096) for frame in frames]
    bulk = [BULK + encode_bulk_header(frame.kind, frame.body, 100, 4096) for frame in frames]
    return [*small, *bulk, HELLO + hello.encode(), SETUP + own_grant(WireOptions()).encode()]
