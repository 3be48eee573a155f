"""Peers that speak the protocol and mean nothing by it: whatever they say, the others go on, and forget them.

A stranger joins the cluster and sends well-formed messages of any kind with any values, to the coordinator or to a
worker; then it goes. Its link may be closed for it; nobody else may notice, and no request may suffer.
"""

import types
import typing
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helixd.errors import PeerLost
from helixd.ids import Incarnation, PeerId
from helixd.plan.cluster.spec import COORDINATOR
from helixd.protocol import messages as m
from helixd.protocol import versions
from helixd.protocol.codec import MESSAGE_TYPES, ProtocolError, from_frame, to_frame
from helixd.wire.link import Frame
from helixd.wire.peers import PeerIdentity
from tests.budget import examples
from tests.vtime.invariants import settle
from tests.vtime.loop import Process
from tests.vtime.model import ROW_BYTES
from tests.vtime.world import HUB, MACHINES, PORT, ProcessEndpoint, World, world

FIRST_SEQUENCE = 1 << 32
NAMES = st.sampled_from([*MACHINES, "w3a", "w3b", "rogue", HUB, "coordinator", "", "x" * 256]) | st.text(max_size=4)
NUMBERS = (
    st.integers(-2, 6) | st.sampled_from([2**31, 2**63 - 1, -(2**63)]) | st.integers(FIRST_SEQUENCE, FIRST_SEQUENCE + 4)
)
FLOATS = st.sampled_from([0.0, 1e-9, 0.5, 1e9, 1e18, -1.0]) | st.floats(allow_nan=False)


def values(annotation: Any) -> st.SearchStrategy[Any]:
    """Anything of a field's type, its bounds left aside."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return values(inner[0])
    if origin is typing.Literal:
        return st.sampled_from(inner)
    if origin is list:
        return st.lists(values(inner[0]), max_size=3)
    if origin is tuple and inner[-1] is ...:
        return st.lists(values(inner[0]), max_size=3).map(tuple)
    if origin is tuple:
        return st.tuples(*(values(each) for each in inner))
    if origin in (typing.Union, types.UnionType):
        return st.one_of(*(values(each) for each in inner))
    if isinstance(annotation, type) and (issubclass(annotation, msgspec.Struct) or hasattr(annotation, "__slots__")):
        hints = typing.get_type_hints(annotation, include_extras=True)
        fields = {name: values(hint) for name, hint in hints.items() if typing.get_origin(hint) is not typing.ClassVar}
        return st.builds(annotation, **fields)
    simple: dict[Any, st.SearchStrategy[Any]] = {
        bool: st.booleans(), int: NUMBERS, float: FLOATS, str: NAMES, type(None): st.none(),
    }  # fmt: skip
    return simple[annotation]


PAYLOADS = st.none() | st.binary(max_size=3 * ROW_BYTES) | st.sampled_from([bytes(ROW_BYTES), bytes(4096)])
# A worker that says what its device does takes part in the next plan; one that then does nothing is another matter.
KINDS = [kind for kind in sorted(MESSAGE_TYPES, key=int) if MESSAGE_TYPES[kind] is not m.Measured]


def is_sound(message: m.Message) -> bool:
    try:
        from_frame(to_frame(message))
    except ProtocolError:
        return False
    return True


ANY = st.one_of(*(values(MESSAGE_TYPES[kind]) for kind in KINDS))
# The first that breaks a bound ends the link, and nobody hears the rest.
SAID = st.one_of(*[ANY.filter(is_sound)] * 7, ANY)
MESSAGES = st.lists(st.tuples(SAID, PAYLOADS, st.sampled_from([0.0, 0.05, 0.5])), min_size=1, max_size=8)


def join_as_rogue(w: World, to: str, hello: bool) -> ProcessEndpoint:
    process = Process(w.loop, "rogue")

    async def ignore(link: object, frame: object) -> None: ...

    endpoint = ProcessEndpoint(w.network, w._identity("rogue"), process, lambda link: ignore, lambda *what: None)

    async def live() -> None:
        async with endpoint:
            link = await endpoint.dial(to, PORT, 5.0)
            if hello:
                hardware = [m.NodeHardware("rogue", "cpu", "x", 1 << 20, 1 << 20)]
                await link.send(to_frame(m.Hello(versions.PROTOCOL_VERSION, hardware, "", "rogue", PORT, "x")))
            await w.loop.create_future()

    process.spawn(live(), "rogue")
    w.advance(0.1)
    return endpoint


def say(w: World, endpoint: ProcessEndpoint, to: str, message: m.Message, payload: bytes | None) -> None:
    link = next((link for peer, link in endpoint.links.items() if peer == to), None)
    try:
        frame: Frame = to_frame(message, None if payload is None else memoryview(payload))
        if link is not None:
            w.loop.run_until_complete(link.send(frame))
    except PeerLost:
        return


def nonsense(w: World, to: str, said: list[tuple[m.Message, bytes | None, float]], *, hello: bool) -> None:
    for name in ("w0", "w1", "w4"):
        w.start_worker(name)
    w.advance(4)
    asked = [w.clients.ask(tuple(range(at, at + 30)), 20, seed=at) for at in range(3)]
    endpoint = join_as_rogue(w, to, hello)
    for message, payload, wait_s in said:
        say(w, endpoint, to, message, payload)
        w.advance(wait_s)
    w.loop.do(lambda: w.network.kill(endpoint))
    # What cannot be understood is logged and ends the link: that is all that may happen.
    w.wrong[:] = [what for what in w.wrong if "logged: frame_failed" not in what or "ProtocolError" not in what]
    settle(w)
    assert [client.outcome for client in asked] == ["finished"] * len(asked)


@given(MESSAGES, st.booleans())
@settings(max_examples=examples(25, 1500), deadline=None)
def test_no_word_of_a_worker_ends_the_coordinator(
    said: list[tuple[m.Message, bytes | None, float]], hello: bool
) -> None:
    with world(3) as w:
        nonsense(w, HUB, said, hello=hello)


@given(MESSAGES)
@settings(max_examples=examples(15, 750), deadline=None)
def test_no_word_of_a_stranger_ends_a_worker(said: list[tuple[m.Message, bytes | None, float]]) -> None:
    with world(3) as w:
        nonsense(w, "w1", said, hello=False)


@given(st.one_of(*(values(MESSAGE_TYPES[kind]) for kind in sorted(MESSAGE_TYPES))))
@settings(max_examples=examples(200, 5000), deadline=None)
def test_a_message_is_read_as_it_was_written_or_refused(message: m.Message) -> None:
    try:
        assert from_frame(to_frame(message)) == message
    except ProtocolError:
        return


@pytest.mark.parametrize(
    "points",
    [
        [(1.0, 1e-3), (64.0, 4e-3), (64.0, 5e-3)],
        [(64.0, 4e-3), (1.0, 1e-3)],
        [(1.0, 5e-324), (64.0, 1e9)],
    ],
)
def test_what_no_device_measures_ends_the_link_and_not_the_coordinator(points: list[tuple[float, float]]) -> None:
    with world(3) as w:
        w.start_worker("w0")
        w.start_worker("w1")
        w.advance(4)
        endpoint = join_as_rogue(w, HUB, hello=True)
        say(w, endpoint, HUB, m.Measured("rogue", points, points), None)
        w.advance(5)
        assert not endpoint.links
        w.loop.do(lambda: w.network.kill(endpoint))
        w.wrong[:] = [what for what in w.wrong if "logged: frame_failed" not in what or "ProtocolError" not in what]
        settle(w)


def test_a_worker_says_hello_once() -> None:
    """Else the nodes of the first time would outlive its link."""
    with world(3) as w:
        w.start_worker("w0")
        w.start_worker("w1")
        w.advance(4)
        endpoint = join_as_rogue(w, HUB, hello=True)
        others = [m.NodeHardware("another", "cpu", "x", 1 << 20, 1 << 20)]
        say(w, endpoint, HUB, m.Hello(versions.PROTOCOL_VERSION, others, "", "rogue", PORT, "x"), None)
        w.advance(1)
        w.loop.do(lambda: w.network.kill(endpoint))
        w.advance(1)
        assert not {"rogue", "another"} & set(w.coordinator.fleet.nodes)
        w.coordinator.cluster_view()
        w.wrong[:] = [what for what in w.wrong if "logged: frame_failed" not in what or "ProtocolError" not in what]
        settle(w)


def test_only_the_last_stage_of_a_sequence_scores_its_prompt() -> None:
    with world(3) as w:
        for name in ("w0", "w1", "w4"):
            w.start_worker(name)
        w.advance(4)
        endpoint = join_as_rogue(w, HUB, hello=True)
        asked = w.clients.ask(tuple(range(30)), 20, logprobs=1, score=True)
        w.wait_until(lambda: w.coordinator.admission.running, 5, "it does not run", step_s=0.001)
        (lease,) = w.coordinator.admission.leases()
        wrong = [(-1.0, [(1, -1.0)])] * 29
        say(w, endpoint, HUB, m.Scores(lease.sequence, lease.attempt, 1, wrong), None)
        w.wait_until(lambda: asked.outcome is not None, 30, "it does not end")
        assert asked.outcome == "finished"
        w.loop.do(lambda: w.network.kill(endpoint))
        settle(w)


def test_no_worker_has_the_name_that_plans_have_for_the_coordinator() -> None:
    with world(3) as w:
        w.start_worker("w0")
        w.start_worker("w1")
        w.advance(4)
        w._identity = lambda name: PeerIdentity(PeerId(COORDINATOR), Incarnation(1))  # type: ignore[method-assign]
        endpoint = join_as_rogue(w, HUB, hello=True)
        del w._identity
        w.advance(1)
        assert set(w.coordinator.fleet.peers) == {"w0", "w1"}
        w.loop.do(lambda: w.network.kill(endpoint))
        settle(w)
