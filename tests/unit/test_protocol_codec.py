"""Every message survives the wire, and nothing malformed gets past the codec."""

import msgpack
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helixd.protocol import messages as m
from helixd.protocol.codec import MESSAGE_TYPES, ProtocolError, from_frame, pack_ids, to_frame, unpack_ids
from helixd.sampling import SamplingParams
from helixd.wire.frames import encode_small_head
from helixd.wire.link import Frame
from helixd.wire.options import WireOptions

EXAMPLES: list[m.Message] = [
    m.Hello(1, [m.NodeHardware("n", "cpu", "x", 10, 5)], "f", "", 7071, "0.1", "g", [("n", 0, 3)]),
    m.Welcome("demo", "f", "float32", 1024, 8, 256, 64),
    m.Refused("version", "too old", True),
    m.Measured("n", [(1.0, 0.5)], [(1.0, 0.25)]),
    m.Probe("p", "127.0.0.1", 1, 4096),
    m.Probed("p", 0.1, 1e6, ""),
    m.EpochPush(3, [m.Assignment("n", "p", 0, 4, 1000, [("q", 1.5), ("", 2.0)])], [m.PeerAddress("p", "h", 1, True)]),
    m.EpochState(3, "n", "ready", 4, 4, ""),
    m.EpochRetire(3),
    m.Open(3, 2**40, 1, "n", 0, 4, "", 5, SamplingParams(seed=-(2**63), logit_bias=((1, -100.0),), logprobs=2), True),
    m.Feed(3, 9, 1, "n", 5, 0, True),
    m.Activations(1, 3, "n", [m.Part(9, 1, 5, 0, 3, True)]),
    m.Tokens("n", [m.Drawn(9, 1, 5, 77, -0.5, [(77, -0.5), (3, -1.0)]), m.Drawn(10, 0, 4, 1)]),
    m.Scores(9, 1, 1, [(-1.0, [(3, -1.0)])]),
    m.StageFailed(9, 1, "n", "kv_full", "no room"),
    m.Close(9, 1, "n"),
    m.Closed(9, 1, "n"),
    m.LinkLost("p", "closed"),
    m.NodeStatus("n", 1, 0.0, 2, 3, 4, 5, 6, 7, 0.001, 8, 9),
    m.Fetch(1, "model.layers.0.w", 0, 10),
    m.Fetched(1, "F32", [2, 2], ""),
    m.Leave("SIGTERM"),
    m.Left(),
    m.Measure("n"),
]  # fmt: skip


def over_the_wire(frame: Frame) -> Frame:
    return Frame(frame.kind, msgpack.unpackb(msgpack.packb(frame.body)), frame.payload)


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda x: type(x).__name__)
def test_round_trip(message: m.Message) -> None:
    assert from_frame(over_the_wire(to_frame(message))) == message


def test_every_kind_has_an_example_and_its_own_number() -> None:
    assert {type(example) for example in EXAMPLES} == set(MESSAGE_TYPES.values())
    declared = [c for c in vars(m).values() if isinstance(c, type) and issubclass(c, m.Message) and c is not m.Message]
    assert len(MESSAGE_TYPES) == len(declared)


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda x: type(x).__name__)
def test_a_later_version_may_append_fields(message: m.Message) -> None:
    body = msgspec.to_builtins(message)
    assert from_frame(Frame(message.KIND, [*body, "from the future"])) == message


junk = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=12,
)  # fmt: skip


@given(kind=st.integers(-1, 30), body=junk)
def test_only_protocol_errors_escape(kind: int, body: object) -> None:
    try:
        message = from_frame(Frame(kind, body))
    except ProtocolError:
        return
    assert message.KIND == kind


def test_errors_name_kind_and_field() -> None:
    with pytest.raises(ProtocolError, match="unknown message kind 99"):
        from_frame(Frame(99, []))
    with pytest.raises(ProtocolError, match=r"Part|Activations.*n|\$"):
        from_frame(Frame(m.Activations.KIND, [1, 3, "n", [[9, 1, 5, 0, 0, True]]]))


@given(st.lists(st.integers(0, 2**31 - 1)))
def test_ids_survive_as_a_payload(ids: list[int]) -> None:
    assert unpack_ids(pack_ids(ids)) == tuple(ids)


def test_a_torn_payload_of_ids_is_refused() -> None:
    assert unpack_ids(None) == ()
    with pytest.raises(ProtocolError, match="7 bytes"):
        unpack_ids(memoryview(bytes(7)))


@given(
    st.text(st.characters(), max_size=1200) | st.sampled_from(["\u00e9" * 1000, "\U0001f600" * 999, "\udcff" * 1001])
)
def test_whatever_is_said_briefly_can_be_said(text: str) -> None:
    """An error may quote a path in any alphabet, or in none."""
    message = m.StageFailed(9, 1, "n", "compute", m.brief(text))
    encode_small_head(message.KIND, to_frame(message).body, None, WireOptions().max_body_bytes)
    assert from_frame(to_frame(message)) == message
    if len(text) < 200 and not any(0xD800 <= ord(letter) < 0xE000 for letter in text):
        assert message.message == text
