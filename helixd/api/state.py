"""What the handlers of one API share, and the count of generations each key has in flight."""

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from aiohttp import web

from helixd.api.envelope import Envelope
from helixd.api.errors import ApiError
from helixd.api.metrics import ApiMetrics
from helixd.api.options import ApiOptions
from helixd.api.sampling_fields import Target
from helixd.api.text import TextThreads, TextTools
from helixd.coordinator.generation import Service

REQUEST_ID = web.RequestKey("helixd.request_id", str)
CLIENT = web.RequestKey("helixd.client", str)


class InFlight:
    """How many generation requests are in flight, of each key and in all; the open API's have no limit here."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._counts: Counter[str] = Counter()
        self._none_left = asyncio.Event()
        self._none_left.set()

    @contextmanager
    def slot(self, client: str) -> Iterator[None]:
        """One request's place. Raises a 429 when the key has no place left."""
        if client and self._counts[client] >= self.limit:
            raise ApiError(
                429,
                f"This key has {self.limit} requests in flight, which is the limit; wait for one to end.",
                code="rate_limit_exceeded",
                headers={"Retry-After": "1"},
            )
        self._counts[client] += 1
        self._none_left.clear()
        try:
            yield
        finally:
            self._counts[client] -= 1
            if not self._counts[client]:
                del self._counts[client]
            if not self._counts:
                self._none_left.set()

    async def empty(self) -> None:
        """Wait until no request is in flight."""
        await self._none_left.wait()


@dataclass(slots=True)
class ApiState:
    """`options` may change while the API runs, for what begins then; nothing else does.

    `created`: when the API started, in seconds since the epoch, which is what OpenAI's `created` fields hold.
    """

    service: Service
    text: TextTools
    options: ApiOptions
    metrics: ApiMetrics
    threads: TextThreads
    in_flight: InFlight
    created: int

    def reconfigure(self, options: ApiOptions) -> None:
        """Answer by these options from now on. Threads and the names of figures stay as they are."""
        self.options = options
        self.in_flight.limit = options.per_key_in_flight

    def target(self) -> Target:
        """What requests are checked against now."""
        return Target(self.service.model_name, self.text.ids, self.service.max_context_tokens)

    def envelope(self, response_id: str, created: int) -> Envelope:
        """The shared part of one request's answers."""
        return Envelope(response_id, created, self.service.model_name, self.options.system_fingerprint)


STATE: web.AppKey[ApiState] = web.AppKey("helixd.api.state", ApiState)
