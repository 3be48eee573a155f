"""Who is asked to measure which link, and what is learnt of who can dial whom."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from helixd.coordinator.admission import Admission
from helixd.coordinator.epochs import Epochs
from helixd.coordinator.fleet import Fleet, Peer
from helixd.coordinator.planning import ModelSizes
from helixd.coordinator.probing import Prober
from helixd.ids import Epoch, Incarnation, NodeId, PeerId
from helixd.protocol import messages as m
from helixd.protocol import versions
from helixd.protocol.codec import from_frame
from helixd.wire.link import Frame
from tests.cluster import make_plan

HUB = PeerId("hub")
A, B = PeerId("a"), PeerId("b")
OK = (0.001, 1e8, "")
NO_WAY = (0.0, 0.0, "no link within 5 s")

Answers = Callable[[PeerId, str], tuple[float, float, str]]


@dataclass
class World:
    """`asked`: who was told to probe whom, in order. `answers` says what they find."""

    answers: Answers
    fleet: Fleet = field(default_factory=Fleet)
    asked: list[tuple[str, str]] = field(default_factory=list)
    pushed: list[tuple[PeerId, m.EpochPush]] = field(default_factory=list)
    prober: Prober | None = None

    def add(self, name: PeerId) -> None:
        anything: Any = object()
        outbox: Any = Box(self, name)
        hello = m.Hello(
            versions.PROTOCOL_VERSION, [m.NodeHardware(name, "cpu", "x", 1 << 30, 1 << 30)], "", "", 1, "test"
        )
        assert not self.fleet.add(Peer(name, Incarnation(1), anything, outbox, f"host of {name}", 1, hello))
        self.fleet.nodes[NodeId(name)].measured = m.Measured(name, [(1.0, 1.0)], [(1.0, 1.0)])


@dataclass
class Box:
    world: World
    name: PeerId

    def post(self, frame: Frame) -> None:
        match from_frame(frame):
            case m.Probe(peer=peer):
                self.world.asked.append((self.name, peer))
                said = m.Probed(peer, *self.world.answers(self.name, peer))
                assert self.world.prober is not None
                asyncio.get_running_loop().call_soon(self.world.prober.on_probed, self.name, said)
            case m.EpochPush() as push:
                self.world.pushed.append((self.name, push))


@asynccontextmanager
async def probed(answers: Answers) -> AsyncIterator[World]:
    """Two workers whose links are known as far as they can be."""
    world = World(answers)
    async with asyncio.TaskGroup() as tasks:
        world.prober = Prober(world.fleet, HUB, tasks, lambda: None, 1 << 16, 5.0)
        for name in (A, B):
            world.add(name)
        world.prober.pump()
        async with asyncio.timeout(5):
            while not world.prober.complete:
                await asyncio.sleep(0)
        yield world
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()


async def test_a_link_that_one_end_made_is_measured_from_the_other_at_once() -> None:
    """b is behind NAT: a cannot dial it, but once b has dialled a there is a link."""
    linked = False

    def answers(src: PeerId, dst: str) -> tuple[float, float, str]:
        nonlocal linked
        linked = linked or (src, dst) == (B, A)
        return OK if linked or HUB in (src, dst) else NO_WAY

    async with probed(answers) as world:
        between = [pair for pair in world.asked if HUB not in pair]
        assert between == [(A, B), (B, A), (A, B)]
        assert not any(fact.error for fact in world.fleet.links.values())
        assert world.fleet.cannot_dial == {(A, B)}
        world.fleet.remove(B, world.fleet.peers[B].link)
        assert world.fleet.cannot_dial == {(A, B)}, "its next life is dialled from the right end at once"


async def test_two_that_nothing_links_are_asked_once_each() -> None:
    async with probed(lambda src, dst: OK if HUB in (src, dst) else NO_WAY) as world:
        assert [pair for pair in world.asked if HUB not in pair] == [(A, B), (B, A)]
        assert not world.fleet.cannot_dial


async def test_the_sender_dials_where_the_receiver_cannot() -> None:
    async with probed(lambda src, dst: OK) as world:
        for cannot, dials in (set(), {B: True, A: False}), ({(B, A)}, {B: False, A: True}):  # type: ignore[var-annotated]
            world.fleet.cannot_dial = cannot
            world.pushed.clear()
            admission = Admission(1, 1.0, 1.0, lambda: ((), ()))
            sizes = ModelSizes(1, 1, 1, 1, 1, 2)
            Epochs(world.fleet, admission, sizes, Epoch(0), lambda epoch: None).push(
                make_plan(2, {A: (0, 1), B: (1, 2)})
            )
            assert {name: push.peers[0].dial for name, push in world.pushed} == dials
