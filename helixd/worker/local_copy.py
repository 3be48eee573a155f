"""The digests of a worker's own copy of the checkpoint: computed once, off the event loop, for whoever asks."""

import asyncio
import threading
from pathlib import Path

from helixd.model.digests import WeightDigests, weight_digests
from helixd.model.index import SafetensorsIndex


class LocalDigests:
    """Remembered in `cache` over restarts."""

    def __init__(self, index: SafetensorsIndex, cache: Path | None) -> None:
        self._index = index
        self._cache = cache
        self._one = asyncio.Lock()
        self._known: WeightDigests | None = None

    async def digests(self) -> WeightDigests:
        """They. Raises ModelError naming a tensor that cannot be read."""
        async with self._one:
            if self._known is None:
                stop = threading.Event()
                try:
                    self._known = await asyncio.to_thread(weight_digests, self._index, self._cache, stop)
                finally:
                    stop.set()
            return self._known
