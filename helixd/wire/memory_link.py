"""One end of a link inside one process, with the behaviour of a real one.

Only asyncio is used, so it runs under a virtual clock. Bodies pass through the codec and payloads are copied, so what a
websocket link would refuse or change is refused or changed here too, and the sender may reuse its memory at once.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from helixd import logs
from helixd.errors import PeerLost
from helixd.ids import Incarnation, PeerId
from helixd.wire.bulk_receiver import empty_buffer
from helixd.wire.counters import LinkCounters, LinkTally
from helixd.wire.credits import CreditGate, CreditReturn
from helixd.wire.errors import FrameError
from helixd.wire.frames import SmallDecoder, byte_view, encode_small_head
from helixd.wire.link import Frame, FrameHandler, LinkMeasurement
from helixd.wire.options import WireOptions
from helixd.wire.peers import PeerIdentity
from helixd.wire.probe import measure

# Far below any latency worth modelling, and far above the rounding of a clock.
_NOW_S = 1e-9

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LinkConditions:
    """What one direction of a link is like. `bandwidth_bytes_per_s` None: unlimited."""

    latency_s: float = 0.0
    bandwidth_bytes_per_s: float | None = None


class OneWay:
    """One direction between two daemons: its conditions, and whether it holds everything back. Outlives links."""

    def __init__(self, conditions: LinkConditions) -> None:
        self.conditions = conditions
        self._open = asyncio.Event()
        self._held = asyncio.Event()
        self._open.set()

    @property
    def held(self) -> bool:
        """Whether frames are held back at the moment."""
        return self._held.is_set()

    def hold(self) -> None:
        """Hold everything back from now on."""
        self._open.clear()
        self._held.set()

    def release(self) -> None:
        """Let what was held back through."""
        self._held.clear()
        self._open.set()

    async def until_held(self) -> None:
        """Wait until frames are held back."""
        await self._held.wait()

    async def until_released(self) -> None:
        """Wait until nothing is held back."""
        await self._open.wait()


class _Lane:
    """One class of frames in one direction: credits, and what is in transit."""

    def __init__(self, window_bytes: int) -> None:
        self.gate = CreditGate(window_bytes)
        self.credits = CreditReturn(window_bytes)
        self.queue: deque[tuple[float, Frame | asyncio.Future[None], int]] = deque()
        self.wake = asyncio.Event()
        self._free_at_s = 0.0

    def put(self, item: Frame | asyncio.Future[None], size_bytes: int, charge: int, conditions: LinkConditions) -> None:
        bandwidth = conditions.bandwidth_bytes_per_s
        now_s = asyncio.get_running_loop().time()
        self._free_at_s = max(now_s, self._free_at_s) + (size_bytes / bandwidth if bandwidth else 0.0)
        self.queue.append((self._free_at_s + conditions.latency_s, item, charge))
        self.wake.set()


class MemoryLink:
    """One end of an in-process link. Made in pairs by `helixd.wire.memory`."""

    def __init__(
        self,
        identity: PeerIdentity,
        outward: OneWay,
        inward: OneWay,
        options: WireOptions,
        spawn: Callable[[Coroutine[Any, Any, None], str], asyncio.Task[None]],
        on_closed: Callable[["MemoryLink", str], None],
    ) -> None:
        self.identity = identity
        self._outward = outward
        self._inward = inward
        self._options = options
        self._spawn = spawn
        self._on_closed = on_closed
        self._closed: str | None = None
        self._farewell: str | None = None
        self._handling = 0
        self._other: MemoryLink | None = None
        self._tally = LinkTally()
        self._decoder = SmallDecoder(options.max_body_bytes, 0)
        self._small = _Lane(options.small_window_bytes)
        self._bulk = _Lane(options.bulk_window_bytes)
        self._tasks: list[asyncio.Task[None]] = []
        self._awaited: set[asyncio.Future[None]] = set()

    @property
    def peer(self) -> PeerId:
        """Who is at the other end."""
        return self.identity.peer

    @property
    def incarnation(self) -> Incarnation:
        """Which life of the peer this link speaks to."""
        return self.identity.incarnation

    @property
    def rtt_s(self) -> float | None:
        """The configured round trip."""
        return self._outward.conditions.latency_s + self._inward.conditions.latency_s

    @property
    def remote_host(self) -> str:
        """Empty: the peer is in this process."""
        return ""

    @property
    def closed(self) -> str | None:
        """Why the link is closed; None while it is open."""
        return self._closed

    @property
    def counters(self) -> LinkCounters:
        """What was carried so far."""
        return self._tally.snapshot()

    @property
    def drained(self) -> bool:
        """Whether nothing this end sent is under way."""
        return not self._small.queue and not self._bulk.queue

    def join(self, other: "MemoryLink") -> None:
        """Make `other` the far end. Both ends call it before either starts."""
        self._other = other

    def start(self, handler: FrameHandler) -> None:
        """Begin to deliver what the other end sends."""
        other = self._far_end()
        for name, work in (
            ("small", self._consume(other._small, handler, bulk=False)),
            ("bulk", self._consume(other._bulk, handler, bulk=True)),
            ("watch", self._watch()),
        ):
            self._tasks.append(self._spawn(work, f"memory link {self.peer} {name}"))

    async def send(self, frame: Frame) -> None:
        """See `Link.send`. Raises FrameError for a frame that breaks a limit."""
        if self._closed is not None:
            raise PeerLost(self.peer, self._closed)
        if frame.kind < 0:
            raise FrameError(f"frame kind {frame.kind} is negative; those belong to the link")
        payload = None if frame.payload is None else byte_view(frame.payload)
        size_bytes = 0 if payload is None else payload.nbytes
        if size_bytes > self._options.max_frame_bytes:
            raise FrameError(
                f"a frame of kind {frame.kind} with {size_bytes} bytes exceeds what {self.peer} accepts, "
                f"{self._options.max_frame_bytes} (max_frame_bytes); send it in parts"
            )
        header = encode_small_head(frame.kind, frame.body, None, self._options.max_body_bytes)
        bulk = size_bytes > self._options.small_payload_bytes
        lane = self._bulk if bulk else self._small
        charge = await self._acquire(lane.gate, len(header) + size_bytes)
        kind, body, _ = self._decoder.decode(header)
        copy: memoryview | None = None
        if payload is not None:
            copy = empty_buffer(size_bytes)
            copy[:] = payload
        lane.put(Frame(kind, body, copy), len(header) + size_bytes, charge, self._outward.conditions)
        self._tally.frames_sent += 1
        self._tally.bulk_frames_sent += bulk
        self._tally.bytes_sent += len(header) + size_bytes

    async def probe(self, max_bytes: int, timeout_s: float) -> LinkMeasurement:
        """See `Link.probe`: measures the configured conditions as a websocket link would."""

        async def ping() -> None:
            await self._transfer(self._small, 0)
            await asyncio.sleep(self._inward.conditions.latency_s)

        async def transfer(payload: memoryview) -> None:
            await self._transfer(self._bulk, payload.nbytes)
            await asyncio.sleep(self._inward.conditions.latency_s)

        return await measure(self.peer, ping, transfer, asyncio.get_running_loop().time, max_bytes, timeout_s)

    async def close(self, reason: str) -> None:
        """Close both ends; the other one hears the reason. Idempotent."""
        self.fail(f"closed here: {reason}", told=reason)

    def kill(self, reason: str = "killed") -> None:
        """Lose the link at both ends at once, as when a process dies."""
        self.fail(f"connection lost: {reason}", told=None)

    def fail(self, reason: str, told: str | None = None) -> None:
        """Close this end for `reason`. Idempotent.

        With `told` the other end handles what was sent before it closes for that; without, both lose what is under way.
        """
        if self._closed is not None:
            return
        self._closed = reason
        error = PeerLost(self.peer, reason)
        for lane in (self._small, self._bulk):
            lane.gate.fail(error)
            if told is None:
                lane.queue.clear()
        for awaited in list(self._awaited):
            if not awaited.done():
                awaited.set_exception(error)
        current = asyncio.current_task()
        for task in self._tasks:
            if task is not current:
                task.cancel()
        self._on_closed(self, reason)
        # While held back, the news does not reach the other end; its own watch ends it.
        if not self._outward.held:
            self._far_end().hear_farewell(told)

    def hear_farewell(self, told: str | None) -> None:
        """The other end has closed."""
        if told is None:
            self.fail("connection lost")
            return
        self._farewell = f"the peer closed the link: {told}"
        # What was sent before is handled first, but not for longer than a silent peer is waited for.
        asyncio.get_running_loop().call_later(self._options.dead_after_s, self.fail, self._farewell)
        other = self._far_end()
        other._small.wake.set()
        other._bulk.wake.set()

    def _far_end(self) -> "MemoryLink":
        if self._other is None:
            raise RuntimeError("a memory link is used before it was joined to its other end")
        return self._other

    async def _acquire(self, gate: CreditGate, frame_bytes: int) -> int:
        charge = gate.take(frame_bytes)
        if charge:
            return charge
        try:
            async with asyncio.timeout(self._options.send_deadline_s):
                return await gate.acquire(frame_bytes)
        except TimeoutError as error:
            reason = f"took nothing for {self._options.send_deadline_s} s"
            self.fail(reason, told=f"you {reason}")
            raise PeerLost(self.peer, reason) from error

    async def _transfer(self, lane: _Lane, size_bytes: int) -> None:
        if self._closed is not None:
            raise PeerLost(self.peer, self._closed)
        charge = await self._acquire(lane.gate, size_bytes)
        arrived: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._awaited.add(arrived)
        arrived.add_done_callback(self._awaited.discard)
        lane.put(arrived, size_bytes, charge, self._outward.conditions)
        await arrived

    async def _consume(self, lane: _Lane, handler: FrameHandler, bulk: bool) -> None:
        loop = asyncio.get_running_loop()
        while self._closed is None:
            if not lane.queue:
                if self._farewell is not None and not self._handling and self._far_end().drained:
                    self.fail(self._farewell, told=None)
                    return
                lane.wake.clear()
                await lane.wake.wait()
                continue
            arrives_s, item, charge = lane.queue[0]
            if arrives_s - loop.time() > _NOW_S:
                await asyncio.sleep(arrives_s - loop.time())
                continue
            if self._inward.held:
                await self._inward.until_released()
                continue
            lane.queue.popleft()
            if isinstance(item, Frame):
                self._tally.bulk_frames_received += bulk
                self._handling += 1
                try:
                    await self._handle(handler, item)
                finally:
                    self._handling -= 1
                if self._closed is not None:
                    return
            elif not item.done():
                item.set_result(None)
            credit = lane.credits.handled(charge)
            if credit:
                lane.gate.restore(credit)

    async def _watch(self) -> None:
        dead_after_s = self._options.dead_after_s
        while self._closed is None:
            await self._inward.until_held()
            try:
                async with asyncio.timeout(dead_after_s):
                    await self._inward.until_released()
            except TimeoutError:
                self.fail(f"no answer for {dead_after_s} s")
            else:
                if self._far_end().closed is not None:
                    self.hear_farewell(None)

    async def _handle(self, handler: FrameHandler, frame: Frame) -> None:
        self._tally.frames_received += 1
        self._tally.bytes_received += 0 if frame.payload is None else frame.payload.nbytes
        try:
            await handler(self, frame)
        except Exception as error:
            logs.event(logger, logging.ERROR, "frame_failed", peer=self.peer, kind=frame.kind, exc_info=True)
            self.fail(
                f"handler of a frame of kind {frame.kind} failed: {error!r}",
                told=f"a frame of kind {frame.kind} could not be handled",
            )
