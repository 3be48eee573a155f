"""Serving tensors of the coordinator's checkpoint to workers that have no copy. Reads are off the event loop."""

import asyncio

from helixd.coordinator.fleet import Peer
from helixd.errors import ModelError
from helixd.model.index import SafetensorsIndex
from helixd.protocol.codec import to_frame
from helixd.protocol.messages import Fetch, Fetched

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
            peer.outbox.post(to_frame(Fetched(request.request, "", [], str(error)[:1000])))
            return
        peer.outbox.post(to_frame(Fetched(request.request, ref.dtype, list(ref.shape), ""), memoryview(piece)))
