"""One link over two websockets: control (small frames, pings, credits) and bulk (large payloads in chunks).

Both sockets are read from the loop's callbacks: pings are answered and credits taken there, and frames are queued for
one consumer per class, which calls the handler; so a slow handler never delays a pong. The queues cannot overflow with
an honest peer, because credits bound them; a peer that sends without credits has its link closed. Small frames are
handed to the transport without waiting, for the same reason; large ones are written by a task of their own.

Every message from the peer, on either socket, is a sign of life. Nothing is retried and nothing is buffered beyond the
windows: a link either delivers in order or is closed, once, with a reason. What a peer sent before it closed the link
is still handled.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from helixd import logs
from helixd.errors import PeerLost
from helixd.ids import Incarnation, PeerId
from helixd.wire.bulk import BulkSender
from helixd.wire.bulk_receiver import BulkReceiver
from helixd.wire.counters import LinkCounters, LinkTally
from helixd.wire.credits import CreditGate, CreditReturn
from helixd.wire.errors import CloseCode, FrameError
from helixd.wire.frames import SmallDecoder, byte_view, check_payload, encode_bulk_header, encode_small_head
from helixd.wire.inbox import Inbox
from helixd.wire.link import Frame, FrameHandler, LinkMeasurement
from helixd.wire.options import WireOptions
from helixd.wire.peers import PeerIdentity
from helixd.wire.probe import measure
from helixd.wire.setup import Grant
from helixd.wire.stream import MessageStream
from helixd.wire.upkeep import KIND_CREDIT, KIND_PROBE, Upkeep

_REASON_GRACE_S = 0.1

logger = logging.getLogger(__name__)


class WebSocketLink:
    """A `helixd.wire.link.Link` over two authenticated websockets to one life of one peer.

    Made by `helixd.wire.opening` when both sides have told what they grant. `on_closed` is called exactly once, if
    `start` was. The link is the sink of its control socket and the owner of its bulk receiver.
    """

    __slots__ = (
        "_bulk", "_bulk_gate", "_bulk_gone", "_bulk_inbox", "_bulk_over", "_bulk_sender", "_closed", "_control",
        "_control_gone", "_decode", "_farewell", "_grant", "_heard", "_loop", "_max_body_bytes", "_on_closed",
        "_options", "_release", "_remote_host", "_small_gate", "_small_inbox", "_small_limit_bytes", "_spawn",
        "_tally", "_tasks", "_torn_down", "_upkeep", "bulk_receiver", "identity",
    )  # fmt: skip

    def __init__(
        self,
        identity: PeerIdentity,
        control: MessageStream,
        bulk: MessageStream,
        remote_host: str,
        grant: Grant,
        options: WireOptions,
        spawn: Callable[[Coroutine[Any, Any, None], str], asyncio.Task[None]],
        on_closed: Callable[["WebSocketLink", str], None],
        release: Callable[[], Awaitable[None]],
    ) -> None:
        self.identity = identity
        self._control = control
        self._bulk = bulk
        self._grant = grant
        self._options = options
        self._spawn = spawn
        self._on_closed = on_closed
        self._release = release
        self._remote_host = remote_host
        self._loop = asyncio.get_running_loop()
        self._closed: str | None = None
        self._farewell: str | None = None
        self._control_gone = asyncio.Event()
        self._bulk_gone = asyncio.Event()
        self._bulk_over = False
        self._torn_down = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._tally = LinkTally()
        self._heard = False
        self._decode = SmallDecoder(options.max_body_bytes, options.small_payload_bytes).decode
        self._max_body_bytes = grant.max_body_bytes
        self._small_limit_bytes = min(options.small_payload_bytes, grant.small_payload_bytes)
        self._small_gate = CreditGate(grant.small_window_bytes)
        self._small_inbox = Inbox(
            self,
            # A credit message costs as much as a small frame.
            CreditReturn(options.small_window_bytes, options.small_window_bytes // 2),
            lambda credit: self._write_internal(KIND_CREDIT, [credit, 0]),
            self._handling_failed,
        )
        self._bulk_gate = CreditGate(grant.bulk_window_bytes)
        self._bulk_sender = BulkSender(bulk, self._bulk_gate, min(options.chunk_bytes, grant.chunk_bytes))
        self.bulk_receiver = BulkReceiver(self, options, KIND_PROBE)
        self._bulk_inbox = Inbox(
            self,
            self.bulk_receiver.credits,
            lambda credit: self._write_internal(KIND_CREDIT, [0, credit]),
            self._handling_failed,
        )
        self._upkeep = Upkeep(options, self._small_gate, self._bulk_gate, self._bulk_sender, self._write_internal)

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
        """Smoothed round trip of the pings; None before the first answer."""
        return self._upkeep.round_trip.smoothed_s

    @property
    def remote_host(self) -> str:
        """The peer's address as seen from here."""
        return self._remote_host

    @property
    def closed(self) -> str | None:
        """Why the link is closed; None while it is open."""
        return self._closed

    @property
    def counters(self) -> LinkCounters:
        """What was carried so far."""
        return self._tally.snapshot()

    def start(self, handler: FrameHandler) -> None:
        """Begin to deliver frames to `handler`, and to watch over the peer."""
        for name, work in (
            ("small", lambda: self._small_inbox.run(handler, self._leave_if_done)),
            ("bulk", lambda: self._bulk_inbox.run(handler, self._leave_if_done)),
            ("bulk-writer", self._bulk_sender.run),
            ("ticker", self._tick),
        ):
            self._tasks.append(self._spawn(self._guard(name, work), f"link {self.peer} {name}"))

    async def send(self, frame: Frame) -> None:
        """See `Link.send`. Also raises FrameError for a frame that breaks a limit; the link stays open."""
        if self._closed is not None:
            raise PeerLost(self.peer, self._closed)
        kind, body, payload = frame
        if kind < 0:
            raise FrameError(f"frame kind {kind} is negative; those belong to the link")
        if payload is not None:
            payload = byte_view(payload)
            if len(payload) > self._small_limit_bytes:
                await self._send_bulk(kind, body, payload)
                self._tally.frames_sent += 1
                self._tally.bulk_frames_sent += 1
                return
        message = encode_small_head(kind, body, payload, self._max_body_bytes)
        more = b"" if payload is None else payload
        size = len(message) + len(more)
        if not self._small_gate.take(size):
            await self._small_gate.acquire(size)
        try:
            self._control.write(message, more)
        except ConnectionError as error:
            raise self._lost(error) from error
        self._tally.bytes_sent += size
        self._tally.frames_sent += 1

    async def probe(self, max_bytes: int, timeout_s: float) -> LinkMeasurement:
        """See `Link.probe`; what it measures and how is described in `helixd.wire.probe`."""
        ping = self._upkeep.answer_to_ping
        return await measure(self.peer, ping, self._probe_bulk, time.monotonic, max_bytes, timeout_s)

    async def close(self, reason: str) -> None:
        """Close both directions and wait until the sockets are closed. Idempotent."""
        self.fail(f"closed here: {reason}", told=reason)
        await self._torn_down.wait()

    async def wait_closed(self) -> None:
        """Wait until the link is closed and its sockets are gone."""
        await self._torn_down.wait()

    def fail(self, reason: str, told: str | None = None) -> None:
        """Close the link for `reason`; the peer is told `told` if given, else the sockets are cut. Idempotent."""
        if self._closed is not None:
            return
        self._closed = reason
        self._say_goodbye(told)
        error = PeerLost(self.peer, reason)
        self._small_gate.fail(error)
        self._bulk_gate.fail(error)
        self._bulk_sender.fail(error)
        self._upkeep.fail(error)
        self._control.stop()
        self._bulk.stop()
        self._small_inbox.stop()
        self._bulk_inbox.stop()
        current = asyncio.current_task()
        for task in self._tasks:
            if task is not current:
                task.cancel()
        self._spawn(self._tear_down(), f"link {self.peer} teardown")
        self._on_closed(self, reason)

    def place(self, _: int) -> memoryview | None:
        """Control messages are small and have no place of their own."""
        return None

    def placed(self) -> None:
        """Never happens on the control socket."""

    def message(self, data: memoryview | bytearray) -> None:
        """One message of the control socket."""
        size = len(data)
        self._heard = True
        self._tally.bytes_received += size
        frame = self._decode(data)
        if frame.kind < 0:
            self._upkeep.take(frame.kind, frame.body)
            return
        inbox = self._small_inbox
        charge = inbox.credits.took(size)
        self._tally.frames_received += 1
        inbox.put(frame, charge)

    def heard(self, size_bytes: int) -> None:
        """Any message is a sign of life."""
        self._heard = True
        self._tally.bytes_received += size_bytes

    def bulk_arrived(self, kind: int, body: object, payload: memoryview | None, charge: int) -> None:
        """A whole frame of the bulk socket."""
        if kind >= 0:
            self._tally.frames_received += 1
            self._tally.bulk_frames_received += 1
            self._bulk_inbox.put(Frame(kind, body, payload), charge)
            return
        self._upkeep.take_probe(kind, body)
        self._bulk_inbox.done(charge)

    def bulk_abandoned(self, charge: int) -> None:
        """The sender of a bulk frame was cancelled."""
        self._bulk_inbox.done(charge)

    def closing(self, code: int, reason: str) -> None:
        """The peer closed the link; what it sent before is handled first. If that takes long, silence ends the link."""
        self._farewell = f"the peer closed the link: {reason or code}"
        self._leave_if_done()

    def bulk_closing(self, reason: str) -> None:
        """The bulk half of the peer's goodbye; the control socket brings the same."""
        self._bulk_over = True
        self._leave_if_done()
        self._loop.call_later(_REASON_GRACE_S, self._miss_control, reason)

    def ended(self, error: Exception | None) -> None:
        """The control connection is gone."""
        self._control_gone.set()
        if self._farewell is None:
            self.fail(f"connection lost: {error or 'the peer is gone'}")

    def bulk_ended(self) -> None:
        """The bulk connection is gone; the control socket usually brings the reason at the same time."""
        self._bulk_gone.set()
        self._bulk_over = True
        self._leave_if_done()
        self._loop.call_later(_REASON_GRACE_S, self._miss_control, "the bulk connection ended")

    def broken(self, error: FrameError) -> None:
        """The peer broke the protocol."""
        logs.event(logger, logging.WARNING, "protocol_broken", peer=self.peer, reason=str(error))
        self.fail(f"the peer broke the protocol: {error}", told=f"you broke the protocol: {error}")

    def _handling_failed(self, frame: Frame, error: BaseException) -> None:
        logs.event(logger, logging.ERROR, "frame_failed", peer=self.peer, kind=frame.kind, exc_info=error)
        reason = f"a frame of kind {frame.kind} could not be handled"
        self.fail(f"{reason}: {error!r}", told=reason)

    def _miss_control(self, reason: str) -> None:
        if self._farewell is None:
            self.fail(f"connection lost: {reason}")

    def _leave_if_done(self) -> None:
        if self._farewell is not None and self._bulk_over and self._small_inbox.empty and self._bulk_inbox.empty:
            self.fail(self._farewell, told="")

    def _say_goodbye(self, told: str | None) -> None:
        try:
            if told is None:
                self._control.abort()
            else:
                self._control.write_close(CloseCode.NORMAL, told)
            if told is None or self._bulk_sender.waiting:
                # Even when the peer is told: half a bulk frame must not go on once its sender has been let go.
                self._bulk.abort()
            else:
                self._bulk.write_close(CloseCode.NORMAL, told)
        except ConnectionError:
            self._control.abort()
            self._bulk.abort()
        if self._farewell is not None:
            # Both sides have spoken. The transports still write what they hold.
            self._control.close()
            self._bulk.close()

    async def _tear_down(self) -> None:
        try:
            async with asyncio.timeout(self._options.close_timeout_s):
                await self._control_gone.wait()
                await self._bulk_gone.wait()
        except TimeoutError:
            logs.event(logger, logging.DEBUG, "no_farewell", peer=self.peer, limit_s=self._options.close_timeout_s)
        finally:
            self._control.abort()
            self._bulk.abort()
            self._torn_down.set()
        # Only aiohttp's own bookkeeping is left; the connections are gone.
        await self._release()

    async def _guard(self, name: str, work: Callable[[], Awaitable[None]]) -> None:
        try:
            await work()
        except (ConnectionError, PeerLost) as error:
            self.fail(f"connection lost: {error}")
        except Exception as error:
            logs.event(logger, logging.ERROR, "link_failed", peer=self.peer, part=name, exc_info=True)
            self.fail(f"internal error: {error!r}", told="internal error")

    async def _send_bulk(self, kind: int, body: object, payload: memoryview) -> None:
        check_payload(kind, payload.nbytes, self._grant.max_frame_bytes, self.peer)
        header = encode_bulk_header(kind, body, payload.nbytes, self._max_body_bytes)
        charge = await self._bulk_gate.acquire(payload.nbytes)
        await self._bulk_sender.send(header, payload, charge)
        self._tally.bytes_sent += len(header) + payload.nbytes

    def _lost(self, error: ConnectionError) -> PeerLost:
        self.fail(f"connection lost: {error}")
        return PeerLost(self.peer, f"connection lost: {error}")

    def _write_internal(self, kind: int, body: list[int]) -> None:
        """Write a message of the link itself; if the connection is gone, its end is already on the way."""
        if self._closed is not None or self._control.closing:
            return
        message = encode_small_head(kind, body, None, self._max_body_bytes)
        try:
            self._control.write(message)
        except ConnectionError as error:
            raise self._lost(error) from error
        self._tally.bytes_sent += len(message)

    async def _tick(self) -> None:
        while True:
            self._upkeep.ping()
            await asyncio.sleep(self._options.ping_interval_s)
            now_s = self._loop.time()
            heard, self._heard = self._heard, False
            if self._upkeep.dead(now_s, heard):
                self.fail(self._farewell or f"no answer for {self._options.dead_after_s} s")
                return
            if self._upkeep.stuck(now_s):
                reason = f"took nothing for {self._options.send_deadline_s} s"
                self.fail(reason, told=f"you {reason}")
                return

    async def _probe_bulk(self, payload: memoryview) -> None:
        token, answered = self._upkeep.expect()
        await self._send_bulk(KIND_PROBE, [token], payload)
        await answered
