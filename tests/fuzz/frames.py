"""A program that throws bytes at everything a stranger's bytes reach first: hello, setup, small frames, bulk headers.

Run by `tests/chaos/test_fuzz_wire.py`; arguments are libFuzzer's. It ends with another status than 0 as soon as
anything but a FrameError or a HandshakeFailed escapes, or more memory is taken than allowed.
"""

import sys

import atheris  # type: ignore[import-not-found]

with atheris.instrument_imports(include=["helixd.wire.frames", "helixd.wire.handshake", "helixd.wire.setup"]):
    from helixd.protocol.codec import ProtocolError, from_frame
    from helixd.wire.errors import FrameError
    from helixd.wire.frames import SmallDecoder, decode_bulk_header
    from helixd.wire.handshake import HandshakeFailed, Hello
    from helixd.wire.link import Frame
    from helixd.wire.setup import Grant

BODY_BYTES, PAYLOAD_BYTES, FRAME_BYTES = 64 << 10, 256 << 10, 256 << 20
_decoder = SmallDecoder(BODY_BYTES, PAYLOAD_BYTES)


def one_input(data: bytes) -> None:
    """The first byte chooses which decoder gets the rest."""
    kind, rest = data[:1], data[1:]
    try:
        if kind < b"\x40":
            frame = _decoder.decode(rest)
            assert frame.payload is None or len(frame.payload) <= len(rest)
            from_frame(frame)
        elif kind < b"\x80":
            number, body, size = decode_bulk_header(rest, BODY_BYTES, FRAME_BYTES)
            assert 0 <= size <= FRAME_BYTES
            from_frame(Frame(number, body))
        elif kind < b"\xc0":
            hello = Hello.decode(rest)
            assert Hello.decode(hello.encode()) == hello
        else:
            Grant.decode(rest)
    except (FrameError, HandshakeFailed, ProtocolError):
        return


if __name__ == "__main__":
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
