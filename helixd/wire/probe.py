"""Measuring one link: round trip over the control socket, bandwidth over the bulk socket, with bounded bytes.

The bandwidth is what the receiver acknowledged: time from the first byte handed out until the receiver's word that it
has read the last one, less one round trip. Sizes grow by four from 64 KiB until a transfer takes 50 ms net of the round
trip or the byte budget is spent; the last, largest transfer counts. What fits into buffers on the way is thus a small
part of what is measured on any link that is slow enough to matter.
"""

import asyncio
import itertools
from collections.abc import Awaitable, Callable

from helixd.errors import PeerLost
from helixd.wire.link import LinkMeasurement
from helixd.wire.options import KIB

FIRST_PROBE_BYTES = 64 * KIB
LONG_ENOUGH_S = 0.05
_PINGS = 5
_GROWTH = 4
# Tokens of probes live above those of the liveness pings, which count up from 1.
_FIRST_TOKEN = 1 << 40


class ProbeDesk:
    """Which answers are awaited. The mutable owner of a link's outstanding probe tokens."""

    def __init__(self) -> None:
        self._tokens = itertools.count(_FIRST_TOKEN)
        self._awaited: dict[int, asyncio.Future[None]] = {}

    def expect(self) -> tuple[int, asyncio.Future[None]]:
        """A fresh token, and what becomes done when it is answered."""
        token = next(self._tokens)
        answered: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._awaited[token] = answered
        answered.add_done_callback(lambda _: self._awaited.pop(token, None))
        return token, answered

    def answer(self, token: int) -> None:
        """The peer answered `token`; unknown ones are late and ignored."""
        answered = self._awaited.get(token)
        if answered is not None and not answered.done():
            answered.set_result(None)

    def fail(self, error: PeerLost) -> None:
        """Nothing will be answered any more."""
        for answered in list(self._awaited.values()):
            if not answered.done():
                answered.set_exception(error)


async def measure(
    peer: str,
    ping: Callable[[], Awaitable[None]],
    transfer: Callable[[memoryview], Awaitable[None]],
    clock: Callable[[], float],
    max_bytes: int,
    timeout_s: float,
) -> LinkMeasurement:
    """Measure with `ping` (returns when answered) and `transfer` (returns when all of it was acknowledged).

    `clock` gives monotonic seconds, finer than a round trip.

    Raises ValueError for a budget below 64 KiB, PeerLost when the link goes or `timeout_s` passes.
    """
    if max_bytes < FIRST_PROBE_BYTES:
        raise ValueError(f"a probe needs a budget of at least {FIRST_PROBE_BYTES} bytes, not {max_bytes}")
    try:
        async with asyncio.timeout(timeout_s):
            rtt_s = float("inf")
            for _ in range(_PINGS):
                started_s = clock()
                await ping()
                rtt_s = min(rtt_s, clock() - started_s)
            size_bytes, spent_bytes = FIRST_PROBE_BYTES, 0
            while True:
                started_s = clock()
                await transfer(memoryview(bytes(size_bytes)))
                elapsed_s = clock() - started_s
                spent_bytes += size_bytes
                # A transfer that is lost in the round trip's noise bounds the bandwidth from below only.
                net_s = max(elapsed_s - rtt_s, elapsed_s / 10, 1e-6)
                if net_s >= LONG_ENOUGH_S or max_bytes - spent_bytes < size_bytes:
                    return LinkMeasurement(rtt_s, size_bytes / net_s, spent_bytes)
                size_bytes = min(size_bytes * _GROWTH, max_bytes - spent_bytes)
    except TimeoutError as error:
        raise PeerLost(peer, f"a link probe of up to {max_bytes} bytes did not finish in {timeout_s} s") from error
