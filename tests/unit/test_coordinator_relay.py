"""What the coordinator carries between workers that nothing else connects: what a plan allows, and never a heap."""

import asyncio
from typing import Any

import pytest

from helixd.coordinator.fleet import Fleet, LinkFact, Peer
from helixd.coordinator.relay import SMALL_BYTES, Relay, node_links, relay_notes, relayable, relayed_fact, used_pairs
from helixd.errors import PeerLost
from helixd.ids import Incarnation, NodeId, PeerId
from helixd.plan.cluster.spec import COORDINATOR
from helixd.plan.plan import Hop, Plan
from helixd.protocol import messages as m
from helixd.protocol import versions
from helixd.protocol.codec import to_frame
from helixd.wire.link import Frame

A, B, C = PeerId("a"), PeerId("b"), PeerId("c")
NOT = LinkFact(0.0, 0.0, "no route to host")
AB = frozenset((A, B))


class FakeLink:
    """Takes a frame when told to, or breaks."""

    def __init__(self) -> None:
        self.taken: list[Frame] = []
        self.waiting = 0
        self.may = asyncio.Event()
        self.broken = False

    async def send(self, frame: Frame) -> None:
        self.waiting += 1
        await self.may.wait()
        self.waiting -= 1
        if self.broken:
            raise PeerLost("b", "takes nothing")
        self.taken.append(frame)


class FakeOutbox:
    def __init__(self) -> None:
        self.posted: list[Frame] = []

    def post(self, frame: Frame) -> None:
        self.posted.append(frame)


def fleet(protocol: int = versions.PROTOCOL_VERSION) -> Fleet:
    """Three workers of one node each, all near the coordinator; a and b do not reach each other."""
    made = Fleet()
    for name in (A, B, C):
        link: Any = FakeLink()
        outbox: Any = FakeOutbox()
        hello = m.Hello(protocol, [m.NodeHardware(f"{name}0", "cpu", "x", 1, 1)], "", "", 1, "test")
        assert not made.add(Peer(name, Incarnation(1), link, outbox, "host", 1, hello))
        made.links[PeerId(COORDINATOR), name] = LinkFact(0.01 if name == A else 0.03, 5e6 if name == A else 2e6)
    for src, dst in ((A, B), (B, A), (A, C), (C, A), (B, C), (C, B)):
        made.links[src, dst] = NOT if {src, dst} == {A, B} else LinkFact(0.001, 1e9)
    return made


def rows(node: str = "b0", size_bytes: int = 64) -> tuple[m.Activations, Frame]:
    message = m.Activations(1, 2, node, [m.Part(1, 0, 5, 4, 1, True)])
    return message, to_frame(message, memoryview(bytearray(size_bytes)))


def test_pairs_that_fail_both_ways_can_be_relayed() -> None:
    made = fleet()
    assert relayable(made) == {AB}
    made.links[B, A] = LinkFact(0.001, 1e9)
    assert relayable(made) == frozenset()


@pytest.mark.parametrize("what", ["one way is not known", "a worker left", "the way here fails", "it is too old"])
def test_pairs_that_cannot_be_relayed(what: str) -> None:
    made = fleet(versions.RELAY_VERSION - 1) if what == "it is too old" else fleet()
    match what:
        case "one way is not known":
            del made.links[B, A]
        case "a worker left":
            del made.peers[B]
        case "the way here fails":
            made.links[PeerId(COORDINATOR), B] = NOT
            assert relayed_fact(made, A, B) is None
    assert relayable(made) == frozenset()


def test_a_relayed_link_is_as_slow_as_its_slower_half_and_as_long_as_both() -> None:
    assert relayed_fact(fleet(), A, B) == LinkFact(0.04, 2e6)


def test_only_pairs_that_the_plan_sends_over_are_relayed_and_their_senders_say_so() -> None:
    made = fleet()
    a, b, c, hub = NodeId("a0"), NodeId("b0"), NodeId("c0"), NodeId(COORDINATOR)
    over = Plan(2, {}, {hub: (Hop(a, 1),), a: (Hop(b, 1), Hop(c, 1)), b: (Hop(hub, 1),), c: (Hop(hub, 1),)}, 1.0)
    around = Plan(2, {}, {hub: (Hop(a, 1),), a: (Hop(c, 1),), c: (Hop(hub, 1),)}, 1.0)
    assert used_pairs(made, over, {AB}) == {AB}
    assert used_pairs(made, around, {AB}) == frozenset()
    assert node_links(made, {AB}) == {(a, b), (b, a)}
    notes = relay_notes(made, over, {AB})
    assert list(notes) == [a]
    assert "b0" in notes[a]
    assert "c0" not in notes[a]


async def test_small_rows_join_what_waits_and_large_ones_hold_their_sender_back() -> None:
    made = fleet()
    relay = Relay(made, lambda one, other: {one, other} == {A, B})
    there: Any = made.peers[B]
    await relay.carry(made.peers[A], *rows(size_bytes=SMALL_BYTES))
    assert len(there.outbox.posted) == 1
    message, frame = rows(size_bytes=SMALL_BYTES + 1)
    sending = asyncio.ensure_future(relay.carry(made.peers[A], message, frame))
    await asyncio.sleep(0)
    assert not sending.done()
    assert there.link.waiting == 1
    assert len(there.outbox.posted) == 1
    there.link.may.set()
    await sending
    assert there.link.taken == [frame]
    assert (relay.carried_frames, relay.carried_bytes, relay.dropped_frames) == (2, 2 * SMALL_BYTES + 1, 0)


async def test_what_cannot_be_passed_on_is_dropped_and_counted_and_the_sender_serves_on() -> None:
    made = fleet()
    relay = Relay(made, lambda one, other: {one, other} == {A, B})
    there: Any = made.peers[B]
    there.link.broken = True
    there.link.may.set()
    await relay.carry(made.peers[A], *rows(size_bytes=SMALL_BYTES + 1))  # its worker takes nothing
    await relay.carry(made.peers[A], *rows("nobody"))  # no such node
    await relay.carry(made.peers[A], *rows("c0"))  # no plan relays between these
    await relay.carry(made.peers[C], *rows())
    assert (relay.carried_frames, relay.dropped_frames) == (0, 4)
    assert not there.outbox.posted
