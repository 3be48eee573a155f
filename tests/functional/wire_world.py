"""Two endpoints of any carrier, with what each received and lost, for the wire's tests."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager

from helixd.ids import Incarnation, PeerId
from helixd.wire.endpoint import Endpoint
from helixd.wire.link import Frame, FrameHandler, Link
from helixd.wire.memory import MemoryEndpoint, MemoryNetwork
from helixd.wire.options import WireOptions
from helixd.wire.peers import PeerIdentity, PeerNetwork

SECRET = b"s" * 32
CARRIERS = ("memory", "dialer", "listener")
DEADLINE_S = 10.0


class Side:
    """One daemon: its endpoint, the frames it got and the links it lost. `on_frame` may replace the handler."""

    def __init__(self, name: str, incarnation: int = 1) -> None:
        self.identity = PeerIdentity(PeerId(name), Incarnation(incarnation))
        self.frames: list[Frame] = []
        self.up: list[Link] = []
        self.lost: list[tuple[str, str]] = []
        self.refusal: str | None = None
        self.on_frame: Callable[[Link, Frame], Awaitable[None]] | None = None
        self._news = asyncio.Event()

    @property
    def name(self) -> PeerId:
        return self.identity.peer

    def accept(self, _: PeerId, __: Incarnation) -> str | None:
        return self.refusal

    def on_link(self, link: Link) -> FrameHandler:
        self.up.append(link)
        self._news.set()
        return self._handle

    def on_lost(self, link: Link, reason: str) -> None:
        self.lost.append((link.peer, reason))
        self._news.set()

    async def _handle(self, link: Link, frame: Frame) -> None:
        if self.on_frame is not None:
            await self.on_frame(link, frame)
        self.frames.append(frame)
        self._news.set()

    async def until(self, condition: Callable[["Side"], bool], timeout_s: float = DEADLINE_S) -> None:
        """Wait until `condition` holds, looked at whenever something happened."""
        async with asyncio.timeout(timeout_s):
            while not condition(self):
                self._news.clear()
                await self._news.wait()

    async def received(self, count: int) -> list[Frame]:
        await self.until(lambda side: len(side.frames) >= count)
        return list(self.frames)

    def websockets(self, options: WireOptions | None = None, secret: bytes | None = SECRET) -> Endpoint:
        return Endpoint(self.identity, options or WireOptions(), secret, self.accept, self.on_link, self.on_lost)

    def memory(self, network: MemoryNetwork, options: WireOptions | None = None) -> MemoryEndpoint:
        return MemoryEndpoint(network, self.identity, options or WireOptions(), self.accept, self.on_link, self.on_lost)


class Pair:
    """`near` and `far` with a link between them. Tests send from near to far."""

    def __init__(self, near: Side, far: Side, near_net: PeerNetwork, far_net: PeerNetwork) -> None:
        self.near = near
        self.far = far
        self.near_net = near_net
        self.far_net = far_net

    @property
    def link(self) -> Link:
        return self.near_net.links[self.far.name]

    @property
    def back(self) -> Link:
        return self.far_net.links[self.near.name]


@asynccontextmanager
async def linked(
    carrier: str, options: WireOptions | None = None, far_options: WireOptions | None = None
) -> AsyncIterator[Pair]:
    """A pair linked over `carrier`: near is the dialer, except for "listener"."""
    near, far = Side("near"), Side("far")
    async with AsyncExitStack() as stack:
        if carrier == "memory":
            network = MemoryNetwork()
            near_net: PeerNetwork = await stack.enter_async_context(near.memory(network, options))
            far_net: PeerNetwork = await stack.enter_async_context(far.memory(network, far_options or options))
        else:
            near_net = await stack.enter_async_context(near.websockets(options))
            far_net = await stack.enter_async_context(far.websockets(far_options or options))
        dialer, listener = (far_net, near_net) if carrier == "listener" else (near_net, far_net)
        host, port = await listener.listen("127.0.0.1", 0)
        await dialer.dial(host, port, DEADLINE_S)
        yield Pair(near, far, near_net, far_net)
