"""A network of daemons inside one process: the same links, dials and refusals as over websockets.

The embedded worker talks to its coordinator over `connect_in_process`; tests build whole clusters with `MemoryNetwork`
and change latency, bandwidth and reachability while they run. A partition holds frames back; if it outlasts
`dead_after_s`, the side that hears nothing loses the link, as with unanswered pings. Runs under a virtual clock.
"""

import asyncio
import itertools
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, Protocol, Self

from helixd.errors import PeerLost
from helixd.ids import Incarnation, PeerId
from helixd.wire.counters import LinkCounters
from helixd.wire.errors import CloseCode
from helixd.wire.handshake import HandshakeFailed, closed_error
from helixd.wire.link import Frame, FrameHandler, Link, LinkLostHandler
from helixd.wire.memory_link import LinkConditions, MemoryLink, OneWay
from helixd.wire.options import WireOptions
from helixd.wire.peers import AcceptPeer, LinkUp, PeerIdentity
from helixd.wire.registry import LinkRegistry

_ROUND_TRIPS_TO_CONNECT = 3


class JoinableEndpoint(Protocol):
    """An endpoint of any carrier that in-process links can be added to."""

    @property
    def identity(self) -> PeerIdentity:
        """Who it is."""
        ...

    @property
    def options(self) -> WireOptions:
        """Its windows and timers."""
        ...

    @property
    def registry(self) -> LinkRegistry:
        """The owner of its links."""
        ...

    def spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Run a task of one of its links."""
        ...


def connect_in_process(
    one: JoinableEndpoint, other: JoinableEndpoint, there: OneWay | None = None, back: OneWay | None = None
) -> MemoryLink:
    """Link two endpoints of this process directly; returns `one`'s end. `there` leads from `one` to `other`.

    Raises HandshakeFailed if either side refuses the other as a peer.
    """
    there = there or OneWay(LinkConditions())
    back = back or OneWay(LinkConditions())
    one.registry.judge(other.identity, incoming=False)
    other.registry.judge(one.identity, incoming=True)
    near = MemoryLink(other.identity, there, back, one.options, one.spawn, one.registry.removed)
    far = MemoryLink(one.identity, back, there, other.options, other.spawn, other.registry.removed)
    near.join(far)
    far.join(near)
    one.registry.add(near)
    other.registry.add(far)
    return near


class MemoryNetwork:
    """Who listens where, and what lies between each pair. The mutable owner of a test's world of links."""

    def __init__(self, conditions: LinkConditions | None = None) -> None:
        self._default = conditions or LinkConditions()
        self._ports = itertools.count(1)
        self._listeners: dict[tuple[str, int], MemoryEndpoint] = {}
        self._ways: dict[tuple[PeerId, PeerId], OneWay] = {}

    def way(self, source: PeerId, target: PeerId) -> OneWay:
        """The direction from `source` to `target`; outlives the links over it."""
        return self._ways.setdefault((source, target), OneWay(self._default))

    def set_conditions(self, one: PeerId, other: PeerId, conditions: LinkConditions) -> None:
        """Set both directions; what is under way keeps its arrival time."""
        self.way(one, other).conditions = conditions
        self.way(other, one).conditions = conditions

    def partition(self, one: PeerId, other: PeerId) -> None:
        """Hold back what is sent both ways. For one direction use `way(source, target).hold()`."""
        self.way(one, other).hold()
        self.way(other, one).hold()

    def heal(self, one: PeerId, other: PeerId) -> None:
        """Let both directions through again."""
        self.way(one, other).release()
        self.way(other, one).release()

    def kill(self, endpoint: "MemoryEndpoint", reason: str = "killed") -> None:
        """What the others see of a killed process: its links are gone and nobody listens there any more."""
        self.forget(endpoint)
        for link in list(endpoint.links.values()):
            if isinstance(link, MemoryLink):
                link.kill(reason)

    def register(self, host: str, port: int, endpoint: "MemoryEndpoint") -> tuple[str, int]:
        """Let `endpoint` listen; port 0 takes a free one. Raises OSError if the address is taken."""
        address = (host, port or next(number for number in self._ports if (host, number) not in self._listeners))
        if address in self._listeners:
            raise OSError(f"{host}:{port} is already in use in this memory network")
        self._listeners[address] = endpoint
        return address

    def forget(self, endpoint: "MemoryEndpoint") -> None:
        """Nobody can dial `endpoint` any more."""
        self._listeners = {address: other for address, other in self._listeners.items() if other is not endpoint}

    def listener(self, host: str, port: int) -> "MemoryEndpoint | None":
        """Who listens at an address."""
        return self._listeners.get((host, port))


class MemoryEndpoint:
    """A `PeerNetwork` in a `MemoryNetwork`. An async context manager; every task it starts ends with it."""

    def __init__(
        self,
        network: MemoryNetwork,
        identity: PeerIdentity,
        options: WireOptions,
        accept: AcceptPeer,
        on_link: LinkUp,
        on_lost: LinkLostHandler,
    ) -> None:
        self._network = network
        self._identity = identity
        self._options = options
        self._registry = LinkRegistry(identity, accept, on_link, on_lost)
        self._tasks = asyncio.TaskGroup()

    @property
    def identity(self) -> PeerIdentity:
        """Who we are."""
        return self._identity

    @property
    def options(self) -> WireOptions:
        """Windows and timers."""
        return self._options

    @property
    def registry(self) -> LinkRegistry:
        """The owner of the links."""
        return self._registry

    @property
    def links(self) -> Mapping[PeerId, Link]:
        """The open links."""
        return self._registry.links

    @property
    def counters(self) -> Mapping[PeerId, LinkCounters]:
        """A snapshot of what each open link carried so far."""
        return self._registry.counters

    def spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Run `work` in this endpoint's task group."""
        return self._tasks.create_task(work, name=name)

    async def __aenter__(self) -> Self:
        await self._tasks.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self.close()
        finally:
            # Only a cancellation may be the group's own doing; the body's errors pass by it unwrapped.
            mine = (kind, error, trace) if isinstance(error, asyncio.CancelledError) else (None, None, None)
            await self._tasks.__aexit__(*mine)

    async def listen(self, host: str, port: int) -> tuple[str, int]:
        """Accept peers at `host:port`. Raises OSError if the address is taken."""
        return self._network.register(host, port, self)

    async def dial(self, host: str, port: int, timeout_s: float, expect: PeerId | None = None) -> Link:
        """See `PeerNetwork.dial`."""
        if expect is not None and expect in self.links:
            return self.links[expect]
        where = f"{expect} ({host}:{port})" if expect is not None else f"{host}:{port}"
        try:
            async with asyncio.timeout(timeout_s):
                return await self._dial(host, port, expect, where)
        except TimeoutError as error:
            raise PeerLost(where, f"no link within {timeout_s} s") from error
        except HandshakeFailed as failure:
            raise closed_error(where, failure.code, failure.reason) from failure

    async def close(self) -> None:
        """Close every link and stop listening. Idempotent."""
        self._network.forget(self)
        await self._registry.close(f"{self._identity.peer} is closing")

    async def _dial(self, host: str, port: int, expect: PeerId | None, where: str) -> Link:
        target = self._network.listener(host, port)
        if target is None:
            raise PeerLost(where, "cannot connect: nobody listens there")
        there = self._network.way(self._identity.peer, target.identity.peer)
        back = self._network.way(target.identity.peer, self._identity.peer)
        await asyncio.sleep(_ROUND_TRIPS_TO_CONNECT * (there.conditions.latency_s + back.conditions.latency_s))
        await there.until_released()
        await back.until_released()
        if self._network.listener(host, port) is not target:
            raise PeerLost(where, "cannot connect: nobody listens there")
        if expect is not None and target.identity.peer != expect:
            raise HandshakeFailed(CloseCode.REFUSED, f"expected {expect}, {target.identity.peer} answers")
        standing = self._registry.same_process(target.identity)
        return standing or connect_in_process(self, target, there, back)


@asynccontextmanager
async def memory_link_pair(
    handle_a: FrameHandler,
    handle_b: FrameHandler,
    options: WireOptions | None = None,
    conditions: LinkConditions | None = None,
) -> AsyncIterator[tuple[MemoryLink, MemoryLink]]:
    """Two joined ends, "a" and "b", for tests of whoever uses a link. Both are closed when the block ends."""
    network = MemoryNetwork(conditions)

    def endpoint(name: str, handler: FrameHandler) -> MemoryEndpoint:
        identity = PeerIdentity(PeerId(name), Incarnation(1))
        return MemoryEndpoint(
            network, identity, options or WireOptions(), lambda *_: None, lambda _: handler, lambda *_: None
        )

    async with endpoint("a", handle_a) as one, endpoint("b", handle_b) as other:
        near = connect_in_process(
            one, other, network.way(PeerId("a"), PeerId("b")), network.way(PeerId("b"), PeerId("a"))
        )
        far = other.links[PeerId("a")]
        if not isinstance(far, MemoryLink):
            raise TypeError("the far end of a memory link is not a memory link")
        yield near, far


async def ignore_frames(_: Link, __: Frame) -> None:
    """A handler for an end that expects nothing."""
