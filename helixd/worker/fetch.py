"""Fetching tensors from the coordinator over its link: one request under way, in pieces, each with a deadline.

Pieces are as large as the line is fast: whatever it carries, some bytes come long before the deadline.
"""

import asyncio
import math
import time
from collections.abc import Callable

from helixd.errors import ModelError, PeerLost
from helixd.ids import PeerId
from helixd.model.decoder import DTYPE_BYTES, parse_dtype
from helixd.model.weights import RawTensor
from helixd.protocol.codec import to_frame
from helixd.protocol.messages import Fetch, Fetched
from helixd.wire.link import Link

FIRST_PIECE_BYTES = 1 << 20
LEAST_PIECE_BYTES, MOST_PIECE_BYTES = 64 << 10, 8 << 20
# The next piece is twice as large after one that took less, half as large after one that took more.
QUICK_S, SLOW_S = 0.5, 4.0


class TensorFetcher:
    """Asks for tensors on one link; `on_fetched` brings the answers."""

    def __init__(self, link: Link, timeout_s: float, now: Callable[[], float] = time.monotonic) -> None:
        self._link = link
        self._now = now
        self._piece_bytes = FIRST_PIECE_BYTES
        self._timeout_s = timeout_s
        self._next_request = 1
        self._waiting: dict[int, asyncio.Future[tuple[Fetched, memoryview | None]]] = {}
        self._one = asyncio.Lock()

    @property
    def peer(self) -> PeerId:
        """Who is asked."""
        return self._link.peer

    def on_fetched(self, message: Fetched, payload: memoryview | None) -> None:
        """An answer came; one nobody waits for is dropped."""
        waiting = self._waiting.pop(message.request, None)
        if waiting is not None and not waiting.done():
            waiting.set_result((message, payload))

    async def fetch(self, name: str) -> RawTensor:
        """The whole tensor. Raises PeerLost, or ModelError naming the tensor."""
        async with self._one:
            first, payload = await self._ask(name, 0)
            size = math.prod(first.shape) * DTYPE_BYTES[parse_dtype(first.dtype)]
            data = bytearray(size)
            at = self._place(name, data, 0, payload)
            while at < size:
                _, payload = await self._ask(name, at)
                at = self._place(name, data, at, payload)
            return RawTensor(first.dtype, tuple(first.shape), data)

    async def _ask(self, name: str, offset: int) -> tuple[Fetched, memoryview | None]:
        request, self._next_request = self._next_request, self._next_request + 1
        answer = asyncio.get_running_loop().create_future()
        began_s = self._now()
        self._waiting[request] = answer
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._link.send(to_frame(Fetch(request, name, offset, self._piece_bytes)))
                message, payload = await answer
        except TimeoutError:
            self._suit(math.inf)
            raise PeerLost(self._link.peer, f"sent no bytes of tensor {name} within {self._timeout_s:g} s") from None
        finally:
            self._waiting.pop(request, None)
        if message.error:
            raise ModelError(f"tensor {name}: the coordinator says: {message.error}")
        self._suit(self._now() - began_s)
        return message, payload

    def _suit(self, took_s: float) -> None:
        if took_s < QUICK_S:
            self._piece_bytes = min(2 * self._piece_bytes, MOST_PIECE_BYTES)
        elif took_s > SLOW_S:
            self._piece_bytes = max(self._piece_bytes // 2, LEAST_PIECE_BYTES)

    def _place(self, name: str, data: bytearray, at: int, payload: memoryview | None) -> int:
        piece = b"" if payload is None else payload
        if not piece or at + len(piece) > len(data):
            raise ModelError(f"tensor {name}: got {len(piece)} bytes at {at} of {len(data)} from {self._link.peer}")
        data[at : at + len(piece)] = piece
        return at + len(piece)
