"""What the two ends of a websocket link say to each other besides frames: pings, credits and the answers to probes.

These are messages of negative kind. The upkeep knows what they mean, and when the peer is dead or takes nothing; it
knows neither sockets nor frames.
"""

import asyncio
import time
from collections.abc import Callable

from helixd.errors import PeerLost
from helixd.wire.bulk import BulkSender
from helixd.wire.credits import CreditGate
from helixd.wire.errors import FrameError
from helixd.wire.frames import integers
from helixd.wire.liveness import ProgressWatch, RoundTrip, SilenceClock
from helixd.wire.options import WireOptions
from helixd.wire.probe import ProbeDesk

KIND_PING = -2
KIND_PONG = -3
KIND_CREDIT = -4
KIND_PROBE = -5
KIND_PROBE_TAKEN = -6

_PINGS_PER_TICK = 64
# A peer may ping so much more often than we do; what it sent while we were stopped comes in one tick.
_FASTER = 8


class Upkeep:
    """One end's. `write` sends a message of the link itself, or nothing once the link is closed."""

    def __init__(
        self,
        options: WireOptions,
        small_gate: CreditGate,
        bulk_gate: CreditGate,
        bulk_sender: BulkSender,
        write: Callable[[int, list[int]], None],
    ) -> None:
        now_s = asyncio.get_running_loop().time()
        self.round_trip = RoundTrip()
        self._options = options
        self._small_gate = small_gate
        self._bulk_gate = bulk_gate
        self._bulk_sender = bulk_sender
        self._write = write
        self._pings_answered = 0
        self._most_pings = _PINGS_PER_TICK + _FASTER * int(options.dead_after_s / options.ping_interval_s)
        self._silence = SilenceClock(options.ping_interval_s, options.dead_after_s, now_s)
        self._stuck = ProgressWatch(options.ping_interval_s, options.send_deadline_s, now_s)
        self._probes = ProbeDesk()

    def ping(self) -> None:
        """Send the next liveness ping."""
        # Not the loop's clock: uvloop's counts whole milliseconds.
        self._write(KIND_PING, [self.round_trip.sent(time.monotonic())])

    def dead(self, now_s: float, heard: bool) -> bool:
        """Whether the peer is. Asked once a tick; `heard`: something came from it since the last."""
        self._pings_answered = 0
        return self._silence.tick(now_s, heard)

    def stuck(self, now_s: float) -> bool:
        """Whether the peer has taken nothing of what waits for it for too long. Asked once a tick."""
        progress = self._small_gate.progress + self._bulk_gate.progress + self._bulk_sender.progress
        waiting = self._small_gate.waiting or self._bulk_gate.waiting or self._bulk_sender.waiting
        return self._stuck.tick(now_s, progress, waiting)

    def take(self, kind: int, body: object) -> None:
        """A message of the peer's end. Raises FrameError for what no honest one says."""
        numbers = integers(kind, body)
        if kind == KIND_PING:
            self._pings_answered += 1
            if self._pings_answered > self._most_pings:
                raise FrameError(f"more than {self._most_pings} pings in {self._options.ping_interval_s} s")
            self._write(KIND_PONG, [numbers[0]])
        elif kind == KIND_PONG:
            self._probes.answer(numbers[0])
            self.round_trip.answered(numbers[0], time.monotonic())
        elif kind == KIND_CREDIT and len(numbers) == 2:
            if numbers[0]:
                self._small_gate.give(numbers[0])
            if numbers[1]:
                self._bulk_gate.give(numbers[1])
        elif kind == KIND_PROBE_TAKEN:
            self._probes.answer(numbers[0])
        else:
            raise FrameError(f"an unknown message of kind {kind}")

    def take_probe(self, kind: int, body: object) -> None:
        """The peer's bandwidth probe has arrived whole. Raises FrameError if it is something else."""
        if kind != KIND_PROBE or not isinstance(body, list) or len(body) != 1 or type(body[0]) is not int:
            raise FrameError(f"an unknown bulk frame of kind {kind}")
        self._write(KIND_PROBE_TAKEN, [body[0]])

    def expect(self) -> tuple[int, asyncio.Future[None]]:
        """A token to probe with, and what becomes done when the peer answers it."""
        return self._probes.expect()

    async def answer_to_ping(self) -> None:
        """Ping for a probe and wait for the answer; the caller keeps the deadline. Raises what `fail` was given."""
        token, answered = self._probes.expect()
        self._write(KIND_PING, [token])
        await answered

    def fail(self, error: PeerLost) -> None:
        """Nothing will be answered any more."""
        self._probes.fail(error)
