"""One link over two websockets: control (small frames, pings, credits) and bulk (large payloads in chunks).

Tasks of a link: one receiver per socket, a consumer that calls the handler for small frames, the bulk writer, and a
ticker for pings and deadlines. The control receiver never waits for anything but its socket: pings are answered there
and small frames queued for the consumer, so a slow handler never delays a pong. That queue cannot overflow with an
honest peer, because credits bound it; a peer that sends without credits has its link closed. The bulk receiver calls
the handler itself: while it runs, the socket is not read and TCP holds the sender back.

Every message from the peer, on either socket, is a sign of life. Nothing is retried and nothing is buffered beyond the
windows: a link either delivers in order or is closed, once, with a reason.
"""

import asyncio
import itertools
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import Any

from aiohttp import WSMessage, WSMsgType

from helixd.errors import PeerLost
from helixd.ids import Incarnation, PeerId
from helixd.wire.bulk import BulkReceiver, BulkSender
from helixd.wire.counters import LinkCounters, LinkTally
from helixd.wire.credits import CreditGate, CreditReturn, frame_charge
from helixd.wire.errors import CloseCode, FrameError
from helixd.wire.frames import byte_view, decode_small, encode_bulk_header, encode_small
from helixd.wire.link import Frame, FrameHandler, LinkMeasurement
from helixd.wire.liveness import SilenceClock
from helixd.wire.options import WireOptions
from helixd.wire.peers import PeerIdentity
from helixd.wire.probe import ProbeDesk, measure
from helixd.wire.setup import Grant
from helixd.wire.sockets import WebSocket, cut, remote_host, write_now

KIND_PING = -2
KIND_PONG = -3
KIND_CREDIT = -4
KIND_PROBE = -5
KIND_PROBE_TAKEN = -6

_CLOSE_REASON_BYTES = 120
_PINGS_PER_TICK = 64
_REASON_GRACE_S = 0.1
_ENDED = (WSMsgType.ERROR, WSMsgType.CLOSED, WSMsgType.CLOSING)
_RTT_GAIN = 0.25

logger = logging.getLogger(__name__)


class WebSocketLink:
    """A `helixd.wire.link.Link` over two authenticated websockets to one life of one peer.

    `bulk_transport` is the bulk socket's transport on the listening side, None on the dialing side. `on_closed` is
    called exactly once. `start` must be called once before anything else.
    """

    def __init__(
        self,
        identity: PeerIdentity,
        control: WebSocket,
        bulk: WebSocket,
        bulk_transport: asyncio.Transport | None,
        grant: Grant,
        options: WireOptions,
        spawn: Callable[[Coroutine[Any, Any, None], str], asyncio.Task[None]],
        on_closed: Callable[["WebSocketLink", str], None],
    ) -> None:
        self.identity = identity
        self._control = control
        self._bulk = bulk
        self._grant = grant
        self._options = options
        self._spawn = spawn
        self._on_closed = on_closed
        self._remote_host = remote_host(control)
        self._closed: str | None = None
        self._torn_down = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._tally = LinkTally()
        self._rtt_s: float | None = None
        self._ping_token = 0
        self._ping_sent_s = 0.0
        self._pings_answered = 0
        self._loop = asyncio.get_running_loop()
        self._silence = SilenceClock(options.ping_interval_s, options.dead_after_s, self._loop.time())
        self._stuck = SilenceClock(options.ping_interval_s, options.send_deadline_s, self._loop.time())
        self._last_progress = 0
        self._small_gate = CreditGate(grant.small_window_bytes)
        self._small_return = CreditReturn(options.small_window_bytes)
        self._bulk_gate = CreditGate(grant.bulk_window_bytes)
        self._bulk_return = CreditReturn(options.bulk_window_bytes)
        self._small_queue: deque[tuple[Frame, int]] = deque()
        self._farewell: str | None = None
        self._small_wake = asyncio.Event()
        chunk_bytes = min(options.chunk_bytes, grant.chunk_bytes)
        self._bulk_sender = BulkSender(bulk, bulk_transport, self._bulk_gate, chunk_bytes)
        self._bulk_receiver = BulkReceiver(options.max_body_bytes, options.max_frame_bytes, KIND_PROBE)
        self._probes = ProbeDesk()

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
        return self._rtt_s

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
        """Begin to deliver frames to `handler`."""
        for name, work in (
            ("control", self._receive_control),
            ("small", partial(self._consume_small, handler)),
            ("bulk", partial(self._receive_bulk, handler)),
            ("bulk-writer", self._bulk_sender.run),
            ("ticker", self._tick),
        ):
            self._tasks.append(self._spawn(self._guard(name, work), f"link {self.peer} {name}"))

    async def send(self, frame: Frame) -> None:
        """See `Link.send`. Also raises FrameError for a frame that breaks a limit; the link stays open."""
        if self._closed is not None:
            raise PeerLost(self.peer, self._closed)
        if frame.kind < 0:
            raise FrameError(f"frame kind {frame.kind} is negative; those belong to the link")
        payload = None if frame.payload is None else byte_view(frame.payload)
        if payload is not None and payload.nbytes > min(
            self._options.small_payload_bytes, self._grant.small_payload_bytes
        ):
            await self._send_bulk(frame.kind, frame.body, payload)
            self._tally.bulk_frames_sent += 1
        else:
            message = encode_small(frame.kind, frame.body, payload, self._grant.max_body_bytes)
            gate = self._small_gate
            await gate.acquire(frame_charge(len(message), gate.window_bytes))
            self._write_control(message)
        self._tally.frames_sent += 1

    async def probe(self, max_bytes: int, timeout_s: float) -> LinkMeasurement:
        """See `Link.probe`; what it measures and how is described in `helixd.wire.probe`."""
        return await measure(self.peer, self._probe_ping, self._probe_bulk, time.monotonic, max_bytes, timeout_s)

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
        error = PeerLost(self.peer, reason)
        if told is None:
            cut(self._control)
        if told is None or self._bulk_sender.waiting:
            # Even when the peer is told (over control): half a bulk frame must not go on once send has raised.
            cut(self._bulk)
        self._small_gate.fail(error)
        self._bulk_gate.fail(error)
        self._bulk_sender.fail(error)
        self._probes.fail(error)
        current = asyncio.current_task()
        for task in self._tasks:
            if task is not current:
                task.cancel()
        self._spawn(self._tear_down(told), f"link {self.peer} teardown")
        self._on_closed(self, reason)

    async def _tear_down(self, told: str | None) -> None:
        try:
            reason = (told or "").encode()[:_CLOSE_REASON_BYTES].decode(errors="ignore").encode()
            async with asyncio.timeout(self._options.close_timeout_s):
                await self._control.close(code=CloseCode.NORMAL, message=reason)
                await self._bulk.close(code=CloseCode.NORMAL, message=reason)
        except TimeoutError:
            logger.debug("link peer=%s: no answer to the close within %s s", self.peer, self._options.close_timeout_s)
        finally:
            cut(self._control)
            cut(self._bulk)
            self._torn_down.set()

    async def _guard(self, name: str, work: Callable[[], Awaitable[None]]) -> None:
        try:
            await work()
        except FrameError as error:
            logger.warning("link peer=%s closed: bad data on %s: %s", self.peer, name, error)
            self.fail(f"the peer broke the protocol: {error}", told=f"you broke the protocol: {error}")
        except (ConnectionError, PeerLost) as error:
            self.fail(f"connection lost: {error}")
        except Exception as error:
            logger.exception("link peer=%s closed: internal error in %s", self.peer, name)
            self.fail(f"internal error: {error!r}", told="internal error")

    async def _send_bulk(self, kind: int, body: object, payload: memoryview) -> None:
        if payload.nbytes > self._grant.max_frame_bytes:
            raise FrameError(
                f"a frame of kind {kind} with {payload.nbytes} bytes exceeds what {self.peer} accepts, "
                f"{self._grant.max_frame_bytes} (max_frame_bytes); send it in parts"
            )
        header = encode_bulk_header(kind, body, payload.nbytes, self._grant.max_body_bytes)
        charge = frame_charge(payload.nbytes, self._bulk_gate.window_bytes)
        await self._bulk_gate.acquire(charge)
        await self._bulk_sender.send(header, payload, charge)
        self._tally.bytes_sent += len(header) + payload.nbytes

    def _write_control(self, message: bytes) -> None:
        try:
            write_now(self._control.send_bytes(message))
        except ConnectionError as error:
            self.fail(f"connection lost: {error}")
            raise PeerLost(self.peer, f"connection lost: {error}") from error
        self._tally.bytes_sent += len(message)

    def _write_internal(self, kind: int, body: list[int]) -> None:
        self._write_control(encode_small(kind, body, None, self._grant.max_body_bytes))

    def _return_credits(self, small: int, bulk: int) -> None:
        if small or bulk:
            self._write_internal(KIND_CREDIT, [small, bulk])

    async def _receive_control(self) -> None:
        options, window_bytes = self._options, self._options.small_window_bytes
        while self._closed is None:
            message = await self._control.receive()
            if message.type is not WSMsgType.BINARY:
                self._other_message(message)
                if self._farewell is not None:
                    return
                continue
            data = message.data
            self._silence.heard()
            self._tally.bytes_received += len(data)
            kind, body, payload = decode_small(data, options.max_body_bytes, options.small_payload_bytes)
            if kind < 0:
                self._internal(kind, body)
                continue
            charge = frame_charge(len(data), window_bytes)
            self._small_return.took(charge)
            self._small_queue.append((Frame(kind, body, payload), charge))
            self._small_wake.set()

    async def _consume_small(self, handler: FrameHandler) -> None:
        queue = self._small_queue
        while self._closed is None:
            while queue:
                frame, charge = queue.popleft()
                await self._handle(handler, frame)
                if self._closed is not None:
                    return
                self._return_credits(self._small_return.handled(charge), 0)
            if self._farewell is not None:
                self.fail(self._farewell, told="")
                return
            self._small_wake.clear()
            await self._small_wake.wait()

    async def _receive_bulk(self, handler: FrameHandler) -> None:
        receiver, window_bytes = self._bulk_receiver, self._options.bulk_window_bytes
        charge = 0
        while self._closed is None:
            message = await self._bulk.receive()
            if message.type is not WSMsgType.BINARY:
                if message.type in _ENDED:
                    # The control socket usually brings the reason at the same time.
                    await asyncio.sleep(_REASON_GRACE_S)
                self._other_message(message)
                if self._farewell is not None:
                    return
                continue
            data = message.data
            self._silence.heard()
            self._tally.bytes_received += len(data)
            payload_bytes = receiver.header(data)
            if payload_bytes is not None:
                charge = frame_charge(payload_bytes, window_bytes)
                self._bulk_return.took(charge)
                continue
            ended = receiver.chunk(data)
            if ended is None:
                continue
            kind, body, payload, whole = ended
            if kind < 0:
                self._probe_arrived(kind, body, whole)
            elif whole:
                self._tally.bulk_frames_received += 1
                await self._handle(handler, Frame(kind, body, payload))
                if self._closed is not None:
                    return
            self._return_credits(0, self._bulk_return.handled(charge))

    async def _handle(self, handler: FrameHandler, frame: Frame) -> None:
        self._tally.frames_received += 1
        try:
            await handler(self, frame)
        except Exception as error:
            logger.exception("link peer=%s closed: the handler of a frame of kind %d failed", self.peer, frame.kind)
            self.fail(
                f"handler of a frame of kind {frame.kind} failed: {error!r}",
                told=f"a frame of kind {frame.kind} could not be handled",
            )

    def _other_message(self, message: WSMessage) -> None:
        if message.type is WSMsgType.CLOSE:
            # What the peer sent before it closed is still handled; if that takes long, the silence ends the link.
            self._farewell = self._farewell or f"the peer closed the link: {message.extra or message.data}"
            self._small_wake.set()
        elif message.type is WSMsgType.ERROR:
            self.fail(f"connection lost: {message.data}")
        elif message.type in (WSMsgType.CLOSED, WSMsgType.CLOSING):
            self.fail("the peer's connection ended without a word")
        elif message.type is not WSMsgType.PONG:
            raise FrameError(f"a websocket message of type {message.type.name}")

    def _internal(self, kind: int, body: object) -> None:
        numbers = body if isinstance(body, list) else []
        if not numbers or any(type(number) is not int for number in numbers):
            raise FrameError(f"a message of kind {kind} must hold integers")
        if kind == KIND_PING:
            self._pings_answered += 1
            if self._pings_answered > _PINGS_PER_TICK:
                raise FrameError(f"more than {_PINGS_PER_TICK} pings in {self._options.ping_interval_s} s")
            self._write_internal(KIND_PONG, [numbers[0]])
        elif kind == KIND_PONG:
            self._pong(numbers[0])
        elif kind == KIND_CREDIT and len(numbers) == 2:
            if numbers[0]:
                self._small_gate.give(numbers[0])
            if numbers[1]:
                self._bulk_gate.give(numbers[1])
        elif kind == KIND_PROBE_TAKEN:
            self._probes.answer(numbers[0])
        else:
            raise FrameError(f"an unknown message of kind {kind}")

    def _pong(self, token: int) -> None:
        self._probes.answer(token)
        if token == self._ping_token:
            rtt_s = time.monotonic() - self._ping_sent_s
            self._rtt_s = rtt_s if self._rtt_s is None else self._rtt_s + _RTT_GAIN * (rtt_s - self._rtt_s)

    async def _tick(self) -> None:
        for token in itertools.count(1):
            # Not the loop's clock: uvloop's counts whole milliseconds.
            self._ping_token, self._ping_sent_s = token, time.monotonic()
            self._write_internal(KIND_PING, [token])
            await asyncio.sleep(self._options.ping_interval_s)
            now_s = self._loop.time()
            self._pings_answered = 0
            if self._silence.tick(now_s):
                self.fail(f"no answer for {self._options.dead_after_s} s")
                return
            progress = self._small_gate.progress + self._bulk_gate.progress + self._bulk_sender.progress
            waiting = self._small_gate.waiting or self._bulk_gate.waiting or self._bulk_sender.waiting
            if progress != self._last_progress or not waiting:
                self._last_progress = progress
                self._stuck.heard()
            if self._stuck.tick(now_s):
                reason = f"took nothing for {self._options.send_deadline_s} s"
                self.fail(reason, told=f"you {reason}")
                return

    async def _probe_ping(self) -> None:
        token, answered = self._probes.expect()
        self._write_internal(KIND_PING, [token])
        await answered

    async def _probe_bulk(self, payload: memoryview) -> None:
        token, answered = self._probes.expect()
        await self._send_bulk(KIND_PROBE, [token], payload)
        await answered

    def _probe_arrived(self, kind: int, body: object, whole: bool) -> None:
        if kind != KIND_PROBE or not isinstance(body, list) or len(body) != 1 or type(body[0]) is not int:
            raise FrameError(f"an unknown bulk frame of kind {kind}")
        if whole:
            self._write_internal(KIND_PROBE_TAKEN, [body[0]])
