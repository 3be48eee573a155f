"""Bytes from strangers before anybody is authenticated: a hello, or a refusal with a close code."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helixd.ids import Incarnation, PeerId
from helixd.wire.errors import CloseCode
from helixd.wire.handshake import MAX_MESSAGE_BYTES, HandshakeFailed, Hello, Purpose
from helixd.wire.peers import PeerIdentity
from tests.budget import examples

NAMES = st.text(min_size=1, max_size=40).filter(
    lambda name: name.isprintable() and len(name.encode("utf-8", "ignore")) <= 200
)
HELLOS = st.builds(
    Hello,
    st.builds(PeerIdentity, NAMES.filter(lambda n: _encodes(n)).map(PeerId), st.integers(0, 2**63 - 1).map(Incarnation),
              st.binary(min_size=16, max_size=16)),
    st.sampled_from(Purpose), st.binary(min_size=16, max_size=16), st.binary(min_size=32, max_size=32),
)  # fmt: skip


def _encodes(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


@given(HELLOS)
@settings(max_examples=examples(100, 2000), deadline=None)
def test_a_hello_survives(hello: Hello) -> None:
    encoded = hello.encode()
    assert len(encoded) <= MAX_MESSAGE_BYTES
    assert Hello.decode(encoded) == hello


@given(HELLOS, st.data())
@settings(max_examples=examples(300, 20_000), deadline=None)
def test_a_changed_hello_is_a_hello_or_refused(hello: Hello, data: st.DataObject) -> None:
    encoded = bytearray(hello.encode())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(encoded)))
        encoded[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
    _decodes_or_refuses(bytes(encoded))


@given(st.binary(max_size=300) | st.binary(max_size=300).map(lambda tail: b"HLXD\x00\x01\x00\x01" + tail))
@settings(max_examples=examples(300, 20_000), deadline=None)
def test_any_bytes_are_a_hello_or_refused(message: bytes) -> None:
    _decodes_or_refuses(message)


def _decodes_or_refuses(message: bytes) -> None:
    try:
        hello = Hello.decode(message)
    except HandshakeFailed as failure:
        assert failure.code in (CloseCode.BAD_HELLO, CloseCode.VERSION_MISMATCH)  # noqa: PT017
    else:
        assert hello.identity.peer.isprintable()
        assert Hello.decode(hello.encode()).identity == hello.identity


def test_a_truncated_hello_of_any_length_is_refused() -> None:
    hello = Hello(PeerIdentity(PeerId("p"), Incarnation(1), bytes(16)), Purpose.BULK, bytes(16), bytes(32)).encode()
    for length in range(len(hello)):
        with pytest.raises(HandshakeFailed):
            Hello.decode(hello[:length])
