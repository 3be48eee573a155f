"""Where a worker's messages go: to their node's worker, or to the coordinator that relays, which waits for nobody."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from helixd.errors import PeerLost
from helixd.ids import NodeId, PeerId
from helixd.protocol import messages as m
from helixd.wire.link import Frame
from helixd.worker.post import PostOffice

ME, HUB, OTHER = PeerId("me"), PeerId("hub"), PeerId("other")
NODE = NodeId("n")
ROWS = m.Activations(1, 2, NODE, [m.Part(1, 0, 5, 4, 1, True)])


class FakeLink:
    """Takes what is small at once, rows only while `open`."""

    closed = None

    def __init__(self, peer: PeerId) -> None:
        self.peer = peer
        self.sent: list[int] = []
        self.open = asyncio.Event()
        self.open.set()

    async def send(self, frame: Frame) -> None:
        if frame.payload is not None:
            await self.open.wait()
        self.sent.append(frame.kind)

    async def close(self, reason: str) -> None:
        raise PeerLost(self.peer, reason)


@asynccontextmanager
async def office() -> AsyncIterator[tuple[PostOffice, Any, Any]]:
    """Linked with the coordinator; `other` hosts the node."""
    async with asyncio.TaskGroup() as tasks:
        post = PostOffice(ME, tasks, lambda *what: None, lambda: None)
        hub: Any = FakeLink(HUB)
        other: Any = FakeLink(OTHER)
        post.add_link(hub)
        post.set_coordinator(HUB)
        post.learn_hosts([(NODE, OTHER)])
        yield post, hub, other
        post.set_coordinator(None)
        post.drop_link(hub)
        post.drop_link(other)


def rows(post: PostOffice) -> bool:
    return post.to_node(NODE, ROWS, memoryview(bytearray(8)), urgent=False)


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_rows_go_to_their_worker_or_nowhere_unless_they_are_relayed() -> None:
    async with office() as (post, hub, other):
        assert not post.reaches(NODE)
        assert not rows(post)
        post.relay(OTHER, True)
        assert post.reaches(NODE)
        assert rows(post)
        await settled()
        assert (hub.sent, other.sent) == ([m.Activations.KIND], [])
        # Told to go direct, it does as soon as there is a link, and not before.
        post.relay(OTHER, False)
        assert rows(post)
        post.add_link(other)
        assert rows(post)
        await settled()
        assert (len(hub.sent), len(other.sent)) == (2, 1)
        post.drop_link(other)
        assert not post.reaches(NODE)


async def test_what_the_coordinator_cannot_pass_on_holds_back_none_of_its_own_messages() -> None:
    async with office() as (post, hub, _):
        post.relay(OTHER, True)
        hub.open.clear()
        assert rows(post)
        await settled()
        post.to_coordinator(m.Tokens(NODE, []))
        await settled()
        assert hub.sent == [m.Tokens.KIND]
        assert not post.congested(NODE)
        post.to_node(NODE, ROWS, memoryview(bytearray((32 << 20) + 1)), urgent=False)
        assert post.congested(NODE)
        hub.open.set()
        await settled()
        assert not post.congested(NODE)
        assert hub.sent == [m.Tokens.KIND, m.Activations.KIND, m.Activations.KIND]


async def test_a_new_coordinator_relays_nothing_before_it_says_so() -> None:
    async with office() as (post, _, _other):
        post.relay(OTHER, True)
        post.set_coordinator(None)
        assert not post.reaches(NODE)
        post.set_coordinator(HUB)
        assert not post.reaches(NODE)
        post.relay(OTHER, True)
        assert post.reaches(NODE)
