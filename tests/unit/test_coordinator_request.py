"""How a request ends: finished, failed, out of time, or its client gone."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from helixd.coordinator.generation import Delta, Event, Failed, Finished, GenerationRequest, PromptScored
from helixd.coordinator.request import EVENT_QUEUE, RequestRun
from helixd.coordinator.sequence import Lease, PipelineLost
from helixd.errors import NoRoute
from helixd.ids import Attempt, Epoch, NodeId, RequestId, SequenceId
from helixd.layers import LayerRange
from helixd.route.router import Route, RouteHop
from helixd.sampling import SamplingParams

LEASE = Lease(
    SequenceId(1), Attempt(0), Epoch(1),
    Route((RouteHop(NodeId("a"), LayerRange(0, 2)), RouteHop(NodeId("b"), LayerRange(2, 4)))),
)  # fmt: skip
Script = Callable[[Callable[[Event], Awaitable[None]]], Awaitable[None]]


def delta(choice: int = 0, text: str = "x") -> Delta:
    return Delta(choice, text, ())


@dataclass
class Choice:
    """A sequence that does as its script says."""

    script: Script
    request: RequestRun | None = None
    id: SequenceId = SequenceId(1)  # noqa: RUF009
    lease: Lease | None = LEASE
    attempts: int = 1
    considered: asyncio.Event = field(default_factory=asyncio.Event)
    turned_away: bool = False
    routed: asyncio.Event = field(default_factory=asyncio.Event)
    ended: str = ""

    async def run(self) -> None:
        assert self.request is not None
        try:
            await self.script(self.request.emit)
            self.ended = "done"
        except asyncio.CancelledError:
            self.ended = "cancelled"
            raise


def request_of(
    *scripts: Script, deadline_s: float | None = None, scored: bool = False
) -> tuple[RequestRun, list[Choice]]:
    run = RequestRun(
        GenerationRequest(
            RequestId("r"), (1, 2), len(scripts), 5, SamplingParams(0), deadline_s=deadline_s, prompt_logprobs=scored
        )
    )
    choices = [Choice(script, run) for script in scripts]
    run.sequences = choices  # type: ignore[assignment]
    return run, choices


async def collected(run: RequestRun) -> list[Event]:
    run.bind(asyncio.create_task(run.run()))
    async with asyncio.timeout(5):
        return [event async for event in run.events()]


async def says(emit: Callable[[Event], Awaitable[None]], *events: Event) -> None:
    for event in events:
        await emit(event)
        await asyncio.sleep(0)


async def test_every_choice_to_its_end() -> None:
    run, _ = request_of(
        lambda emit: says(emit, delta(0), delta(0), Finished(0, "stop", 2)),
        lambda emit: says(emit, delta(1), Finished(1, "length", 1)),
    )
    events = await collected(run)
    assert [e for e in events if isinstance(e, Finished)] == [Finished(1, "length", 1), Finished(0, "stop", 2)]
    assert sum(isinstance(e, Delta) for e in events) == 3


async def test_no_text_of_any_choice_before_the_prompts_scores() -> None:
    scores = PromptScored((None, None))

    async def late(emit: Callable[[Event], Awaitable[None]]) -> None:
        await asyncio.sleep(0.02)
        await says(emit, scores, delta(0), Finished(0, "stop", 1))

    run, _ = request_of(late, lambda emit: says(emit, delta(1), Finished(1, "stop", 1)), scored=True)
    assert (await collected(run))[0] == scores


async def test_one_choices_error_ends_all_and_is_the_last_event() -> None:
    async def lost(emit: Callable[[Event], Awaitable[None]]) -> None:
        await emit(delta(0))
        raise PipelineLost("the pipeline broke 4 times")

    async def endless(emit: Callable[[Event], Awaitable[None]]) -> None:
        while True:
            await asyncio.sleep(0.001)
            await emit(delta(1))

    run, (_, other) = request_of(lost, endless)
    events = await collected(run)
    assert events[-1] == Failed("pipeline_lost", "the pipeline broke 4 times")
    assert not any(isinstance(event, Finished) for event in events)
    assert other.ended == "cancelled"


async def test_no_route_is_a_lost_pipeline_and_a_bug_is_an_internal_error_without_its_words() -> None:
    async def no_route(emit: object) -> None:
        raise NoRoute("nothing is up")

    async def bug(emit: object) -> None:
        raise KeyError("secret")

    (failed,) = await collected(request_of(no_route)[0])
    assert failed == Failed("pipeline_lost", "nothing is up")
    (internal,) = await collected(request_of(bug)[0])
    assert isinstance(internal, Failed)
    assert internal.code == "internal_error"
    assert "secret" not in internal.message


async def test_the_deadline_ends_it_by_name() -> None:
    run, (choice,) = request_of(lambda emit: asyncio.sleep(60), deadline_s=0.02)
    assert await collected(run) == [Failed("timeout", "the request did not finish within 0.02 s")]
    assert choice.ended == "cancelled"


async def test_an_error_reaches_a_client_whose_queue_is_full() -> None:
    async def floods(emit: Callable[[Event], Awaitable[None]]) -> None:
        for _ in range(EVENT_QUEUE):
            await emit(delta(0))
        raise PipelineLost("gone")

    run, _ = request_of(floods)
    task = asyncio.create_task(run.run())
    run.bind(task)
    async with asyncio.timeout(5):
        await task
        assert [event async for event in run.events()] == [Failed("pipeline_lost", "gone")]


async def test_generation_runs_ahead_of_the_client_by_a_queue_and_no_further() -> None:
    said = 0

    async def talks(emit: Callable[[Event], Awaitable[None]]) -> None:
        nonlocal said
        while True:
            await emit(delta(0))
            said += 1

    run, (choice,) = request_of(talks)
    run.bind(asyncio.create_task(run.run()))
    await asyncio.sleep(0.02)
    assert said == EVENT_QUEUE
    await run.cancel()
    assert choice.ended == "cancelled"
    await run.cancel()


async def test_the_route_stays_known_after_the_last_attempt_and_moves_are_counted() -> None:
    run, choices = request_of(
        lambda emit: says(emit, delta(0), Finished(0, "stop", 1)), lambda emit: says(emit, Finished(1, "stop", 0))
    )
    await collected(run)
    choices[0].lease = None
    assert run.route == ("a[0, 2)", "b[2, 4)")
    choices[0].attempts, choices[1].attempts = 3, 0
    assert run.retries == 2


async def test_waiting_for_the_route_ends_with_the_route_the_request_or_the_time() -> None:
    run, (choice,) = request_of(lambda emit: asyncio.sleep(60))
    run.bind(asyncio.create_task(run.run()))
    await run.wait_routed(0.01)
    choice.considered.set()
    choice.routed.set()
    async with asyncio.timeout(5):
        await run.wait_routed(60)
    await run.cancel()
    over, _ = request_of(lambda emit: asyncio.sleep(0))
    over.bind(asyncio.create_task(over.run()))
    async with asyncio.timeout(5):
        await over.wait_routed(60)


async def test_the_first_choices_route_is_not_enough_while_another_may_be_turned_away() -> None:
    run, choices = request_of(*[lambda emit: asyncio.sleep(60)] * 2)
    run.bind(asyncio.create_task(run.run()))
    choices[0].considered.set()
    choices[0].routed.set()
    waiting = asyncio.create_task(run.wait_routed(60))
    await asyncio.sleep(0.01)
    assert not waiting.done()
    choices[1].turned_away = True
    choices[1].considered.set()
    async with asyncio.timeout(5):
        await waiting
    assert run.turned_away
    await run.cancel()


async def test_giving_up_ends_it_with_the_reason_given_first() -> None:
    first, second = Failed("shutting_down", "stopping"), Failed("other", "later")
    run, (choice,) = request_of(lambda emit: asyncio.sleep(60), deadline_s=50)
    asyncio.get_running_loop().call_later(0.01, lambda: (run.give_up(first), run.give_up(second)))
    assert await collected(run) == [first]
    assert choice.ended == "cancelled"


async def test_giving_up_before_it_began_and_after_it_is_over() -> None:
    failure = Failed("shutting_down", "stopping")
    early, _ = request_of(lambda emit: asyncio.sleep(60))
    early.give_up(failure)
    assert await collected(early) == [failure]
    over, _ = request_of(lambda emit: says(emit, Finished(0, "stop", 0)))
    assert await collected(over) == [Finished(0, "stop", 0)]
    over.give_up(failure)
