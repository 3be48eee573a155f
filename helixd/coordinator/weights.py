"""The coordinator's checkpoint as workers meet it: tensors for those without a copy, a comparison for those with one.

Reads and digests are off the event loop.
"""

import asyncio
import threading
from collections.abc import Callable

from helixd.coordinator.fleet import Peer
from helixd.errors import ModelError
from helixd.model.digests import WeightDigests
from helixd.model.index import SafetensorsIndex
from helixd.protocol.codec import to_frame
from helixd.protocol.messages import Fetch, Fetched, Refused, brief

MAX_PIECE_BYTES = 8 << 20


class WeightServer:
    """Answers `Fetch`, one at a time per worker since it is called from the worker's frame handler."""

    def __init__(self, index: SafetensorsIndex | None) -> None:
        self._index = index

    async def answer(self, peer: Peer, request: Fetch) -> None:
        """Send the piece, or say why not."""
        try:
            if self._index is None:
                raise ModelError("the coordinator has no checkpoint to serve")
            ref = self._index.ref(request.tensor)
            length = min(request.length, MAX_PIECE_BYTES, max(0, ref.nbytes - request.offset))
            piece = await asyncio.to_thread(self._index.read_range, request.tensor, request.offset, length)
        except (ModelError, ValueError) as error:
            peer.parcels.post(to_frame(Fetched(request.request, "", [], brief(str(error)))))
            return
        peer.parcels.post(to_frame(Fetched(request.request, ref.dtype, list(ref.shape), ""), memoryview(piece)))


class WeightCheck:
    """Compares a worker's weights with the coordinator's own. `compute` blocks; None: nothing is compared.

    The first worker that has a copy starts the computation and comes back when it is done: a coordinator whose workers
    fetch never reads its weights for this.
    """

    def __init__(self, compute: Callable[[threading.Event], WeightDigests] | None, tasks: asyncio.TaskGroup) -> None:
        self._compute = compute
        self._tasks = tasks
        self._digests: WeightDigests | None = None
        self._problem = ""
        self._running: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to compute, if that is not done yet."""
        if self._running is None and self._compute is not None:
            self._running = self._tasks.create_task(self._run(self._compute), name="weight digests")

    def why_not(self, theirs: bytes) -> Refused | None:
        """Why a worker with these digests must not join; None if it may."""
        if self._compute is None:
            return None
        self.start()
        if self._problem:
            return Refused("weights", f"the coordinator cannot read its own weights: {self._problem}", False)
        if self._digests is None:
            return Refused("verifying", "the coordinator still computes the digests of its own weights", False)
        wrong = self._digests.difference(theirs)
        if wrong is None:
            return None
        return Refused("weights", f"its weights are others: {wrong}; use the same files, or none", True)

    async def _run(self, compute: Callable[[threading.Event], WeightDigests]) -> None:
        stop = threading.Event()
        try:
            self._digests = await asyncio.to_thread(compute, stop)
        except ModelError as error:
            self._problem = str(error)
        finally:
            stop.set()
