"""A request under way: its choices run side by side, their events leave in one bounded queue.

Decides how a request ends: every choice finished, one error, the client gone, or the daemon going. Generation does not
wait for the client's socket until the queue is full; then the choice that has something to say waits.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence

from helixd import logs
from helixd.coordinator.generation import Delta, Event, Failed, GenerationRequest, PromptScored
from helixd.coordinator.sequence import PipelineLost, SequenceRun
from helixd.errors import NoRoute
from helixd.route.admission import QueueFull

log = logging.getLogger(__name__)

EVENT_QUEUE = 256


class RequestRun:
    """Implements `Generation`. `run` is the request's task; `bind` gives it that task to cancel."""

    def __init__(self, request: GenerationRequest) -> None:
        self.request = request
        self.sequences: Sequence[SequenceRun] = ()
        self._events: asyncio.Queue[Event | None] = asyncio.Queue(EVENT_QUEUE)
        self._scored = asyncio.Event()
        if not request.prompt_logprobs:
            self._scored.set()
        self._task: asyncio.Task[None] | None = None
        self._last_route: tuple[str, ...] = ()
        self._deadline: asyncio.Timeout | None = None
        self._given_up: Failed | None = None

    @property
    def route(self) -> tuple[str, ...]:
        """The route of the first choice's current (or last) attempt."""
        lease = self.sequences[0].lease if self.sequences else None
        if lease is not None:
            self._last_route = tuple(f"{hop.node}{hop.layers}" for hop in lease.route.hops)
        return self._last_route

    @property
    def retries(self) -> int:
        """Attempts beyond the first, over all choices."""
        return sum(max(0, sequence.attempts - 1) for sequence in self.sequences)

    def bind(self, task: asyncio.Task[None]) -> None:
        """The task that runs this request."""
        self._task = task

    @property
    def turned_away(self) -> bool:
        """Whether a choice found neither room nor a place in line."""
        return any(sequence.turned_away for sequence in self.sequences)

    async def wait_routed(self, at_most_s: float) -> None:
        """Until no choice is turned away any more and the first has a route, the request is over, or `at_most_s`."""
        assert self._task is not None
        try:
            async with asyncio.timeout(at_most_s), asyncio.TaskGroup() as waiting:
                routed = waiting.create_task(self._routed(), name="first route")
                await asyncio.wait({routed, self._task}, return_when=asyncio.FIRST_COMPLETED)
                routed.cancel()
        except TimeoutError:
            return

    async def _routed(self) -> None:
        for sequence in self.sequences:
            await sequence.considered.wait()
        await self.sequences[0].routed.wait()

    async def emit(self, event: Event) -> None:
        """Queue an event of a choice, after the prompt's scores where those are wanted."""
        if isinstance(event, PromptScored):
            self._scored.set()
        elif isinstance(event, Delta):
            _ = self.route
            await self._scored.wait()
        await self._events.put(event)

    async def run(self) -> None:
        """Run every choice to its end; an error of one ends the request."""
        failure: Failed | None = None
        try:
            async with (
                asyncio.timeout(0 if self._given_up else self.request.deadline_s) as self._deadline,
                asyncio.TaskGroup() as choices,
            ):
                for sequence in self.sequences:
                    choices.create_task(sequence.run(), name=f"sequence {sequence.id}")
        except* (NoRoute, PipelineLost) as errors:
            failure = Failed("pipeline_lost", str(_first(errors)))
        except* QueueFull as errors:
            failure = Failed("rate_limit_exceeded", str(_first(errors)))
        except* TimeoutError:
            failure = self._given_up or Failed(
                "timeout", f"the request did not finish within {self.request.deadline_s:g} s"
            )
        except* Exception as errors:
            # One request's bug must not end the daemon; it is logged with its trace and the client is told.
            logs.event(log, logging.ERROR, "request_failed", request=self.request.request_id, exc_info=errors)
            failure = Failed("internal_error", "an internal error ended this request; the daemon's log has more")
        finally:
            self._deadline = None
        if failure is not None:
            while not self._events.empty():
                self._events.get_nowait()
            self._events.put_nowait(failure)
        await self._events.put(None)

    async def events(self) -> AsyncIterator[Event]:
        """Events in order, to the end."""
        while (event := await self._events.get()) is not None:
            yield event

    def give_up(self, failure: Failed) -> None:
        """End the request with an error now, unless it is over."""
        self._given_up = self._given_up or failure
        if self._deadline is not None and not self._deadline.expired():
            self._deadline.reschedule(0)

    async def cancel(self) -> None:
        """The client is gone: end every choice. Returns when each has released its route."""
        if self._task is not None and not self._task.done():
            self._task.cancel()
            await asyncio.wait({self._task})


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
