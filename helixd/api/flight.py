"""One HTTP request's generations from submit to end: the only place that submits, follows and cancels them.

Owns the request's figures (tokens, times, outcome) and reports them once: to the metrics and as one log line. Whatever
way a generation is left (client gone, refusal of a sibling, an error), it is cancelled and the cancel awaited.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Self

from helixd.api.errors import ApiError
from helixd.api.metrics import ApiMetrics
from helixd.api.prepare import Prepared
from helixd.coordinator.generation import (
    Delta,
    Event,
    Failed,
    Finished,
    Generation,
    GenerationRequest,
    Refused,
    Service,
)
from helixd.logs import event

log = logging.getLogger("helixd.api")

Sink = Callable[[int, Event], None]


@asynccontextmanager
async def task_group() -> AsyncIterator[asyncio.TaskGroup]:
    """A TaskGroup that raises its first task's error itself, not a group of one."""
    try:
        async with asyncio.TaskGroup() as group:
            yield group
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None


class Flight:
    """The generations of one HTTP request. Enter it, start them in a task group, leave it when the answer is sent."""

    def __init__(
        self,
        service: Service,
        prepared: Prepared,
        metrics: ApiMetrics,
        *,
        request_id: str,
        path: str,
        prompt_field: str,
    ) -> None:
        self.prepared = prepared
        self.admitted = asyncio.Event()
        self.outcome = "ok"
        self._service = service
        self._metrics = metrics
        self._request_id = request_id
        self._path = path
        self._prompt_field = prompt_field
        self._generations: dict[int, Generation] = {}
        self._started_at = time.monotonic()
        self._first_token_s: float | None = None
        self._last_token_at: dict[tuple[int, int], float] = {}
        self._completion_tokens = 0
        self._reasons: list[str] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, asyncio.CancelledError):
            self.outcome = "client_gone"
        elif isinstance(error, ApiError | Refused):
            self.outcome = error.code or str(error.status)
        elif error is not None:
            self.outcome = "internal_error"
        self._report()

    def start(self, group: asyncio.TaskGroup, sink: Sink, on_end: Callable[[], None] = lambda: None) -> None:
        """Submit every prompt's generation and feed its events to `sink`; `on_end` is called as each one ends well."""
        for prompt, request in enumerate(self.prepared.requests):
            group.create_task(self._follow(prompt, request, sink, on_end), name=f"generation {request.request_id}")

    @property
    def route_headers(self) -> dict[str, str]:
        """`x-helixd-route`, for people: the first prompt's route now."""
        hops = " -> ".join(self._generations[0].route)
        return {"x-helixd-route": "".join(char if " " <= char <= "~" else "?" for char in hops)}

    @property
    def retries(self) -> int:
        """How many times choices of this request moved to another route so far."""
        return sum(generation.retries for generation in self._generations.values())

    async def _follow(self, prompt: int, request: GenerationRequest, sink: Sink, on_end: Callable[[], None]) -> None:
        try:
            with self._metrics.waiting.track():
                generation = await self._service.submit(request)
        except Refused as refused:
            if refused.code == "context_length_exceeded":
                # What is too long came in this field; the service knows tokens only.
                refused.param = self._prompt_field
            raise
        self._generations[prompt] = generation
        if len(self._generations) == len(self.prepared.requests):
            self.admitted.set()
        with self._metrics.running.track():
            await self._feed(prompt, request, generation, sink)
        # Not after an error: the task group says that one, and an end must not be taken for success meanwhile.
        on_end()

    async def _feed(self, prompt: int, request: GenerationRequest, generation: Generation, sink: Sink) -> None:
        open_choices = request.n
        failed = False
        try:
            async for item in generation.events():
                open_choices -= isinstance(item, Finished)
                failed = failed or isinstance(item, Failed)
                self._observe(prompt, item)
                sink(prompt, item)
            if open_choices > 0 and not failed:
                raise RuntimeError(f"generation {request.request_id} ended with {open_choices} choices open")
        finally:
            if open_choices > 0:
                # The task group waits for this even when the request is cancelled a second time.
                await generation.cancel()

    def _observe(self, prompt: int, item: Event) -> None:
        now = time.monotonic()
        if isinstance(item, Delta) and item.tokens:
            if self._first_token_s is None:
                self._first_token_s = now - self._started_at
                self._metrics.first_token_s.observe(self._first_token_s)
            previous = self._last_token_at.get((prompt, item.choice))
            if previous is not None:
                self._metrics.inter_token_s.observe((now - previous) / len(item.tokens))
            self._last_token_at[prompt, item.choice] = now
            self._completion_tokens += len(item.tokens)
        elif isinstance(item, Finished):
            self._reasons.append(item.reason)

    def _report(self) -> None:
        elapsed_s = time.monotonic() - self._started_at
        choices = sum(request.n for request in self.prepared.requests)
        if self._generations:
            aborted = ["abort"] * (choices - len(self._reasons))
            self._metrics.finished(
                self.prepared.prompt_tokens, self._completion_tokens, [*self._reasons, *aborted], elapsed_s
            )
        event(
            log,
            logging.INFO,
            "request",
            request=self._request_id,
            id=self.prepared.response_id,
            path=self._path,
            outcome=self.outcome,
            prompt_tokens=self.prepared.prompt_tokens,
            completion_tokens=self._completion_tokens,
            choices=choices,
            finish=sorted(set(self._reasons)),
            ttft_s=None if self._first_token_s is None else round(self._first_token_s, 4),
            total_s=round(elapsed_s, 4),
            retries=self.retries,
            route=list(self._generations[0].route) if 0 in self._generations else [],
        )
