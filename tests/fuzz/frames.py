"""A program that throws bytes at `tests.fuzz.target`, guided by what they reach.

Run by `tests/chaos/test_fuzz_wire.py`; arguments are libFuzzer's. It ends with another status than 0 as soon as
anything but a FrameError, a HandshakeFailed or a ProtocolError escapes, or more memory is taken than allowed.
"""

import sys

import atheris  # type: ignore[import-not-found]

with atheris.instrument_imports(include=["helixd.wire.frames", "helixd.wire.handshake", "helixd.wire.setup"]):
    from tests.fuzz.target import one_input

if __name__ == "__main__":
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
