"""A sequence against workers that answer, break, repeat themselves and answer too late."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helixd.coordinator.generation import Delta, Event, Finished, GenerationRequest, PromptScored
from helixd.coordinator.sequence import (
    INBOX_LIMIT,
    LINK_CUT,
    Broken,
    Lease,
    PipelineLost,
    ScoresArrived,
    SequenceLimits,
    SequenceRun,
    TokenArrived,
)
from helixd.coordinator.text import ChoiceText
from helixd.ids import Attempt, Epoch, NodeId, RequestId, SequenceId
from helixd.layers import LayerRange
from helixd.protocol import messages as m
from helixd.protocol.codec import unpack_ids
from helixd.route.router import Route, RouteHop
from helixd.sampling import SamplingParams, TokenLogprobs

A, B = NodeId("a"), NodeId("b")
ROUTE = Route((RouteHop(A, LayerRange(0, 2)), RouteHop(B, LayerRange(2, 4))))
SAMPLING = SamplingParams(seed=0, temperature=0.0)
SOON = SequenceLimits(step_s=5.0, max_migrations=3)


def following(ids: tuple[int, ...]) -> int:
    """The fake model."""
    return (sum(ids) * 31 + len(ids)) % 251


def continued(prompt: tuple[int, ...], n: int) -> list[int]:
    ids = prompt
    for _ in range(n):
        ids = (*ids, following(ids))
    return list(ids[len(prompt) :])


class Letters:
    def feed(self, token_id: int) -> str:
        return f"<{token_id}>"

    def flush(self) -> str:
        return ""


@dataclass
class Workers:
    """The hub and the route behind it. `before_answer` may do anything to the run before a token is delivered."""

    before_answer: Callable[["Workers", int], bool] = lambda workers, step: True
    run: SequenceRun | None = None
    leases: list[Lease] = field(default_factory=list)
    released: list[Lease] = field(default_factory=list)
    opens: list[m.Open] = field(default_factory=list)
    feeds: list[m.Feed] = field(default_factory=list)
    grown: list[int] = field(default_factory=list)
    waited_s: list[float] = field(default_factory=list)
    break_at_grant: list[str] = field(default_factory=list)
    kv: dict[int, tuple[int, ...]] = field(default_factory=dict)  # by attempt: what has been fed

    async def acquire(self, run: SequenceRun) -> Lease:
        await asyncio.sleep(0)
        self.run = run
        self.leases.append(Lease(run.id, Attempt(run.attempts), Epoch(1), ROUTE))
        run.begin(self.leases[-1])
        if self.break_at_grant:
            self.breaks(self.break_at_grant.pop())
        await asyncio.sleep(0)
        return self.leases[-1]

    def send(self, node: NodeId, message: m.Message, payload: memoryview | None = None) -> None:
        if isinstance(message, m.Open):
            assert (node, message.node) in ((A, A), (B, B))
            self.opens.append(message)
        elif isinstance(message, m.Feed):
            assert node == A
            self.feeds.append(message)
            held = self.kv.setdefault(message.attempt, ())
            assert message.start == len(held), "a gap or a repetition in what is fed"
            self.kv[message.attempt] = held + unpack_ids(payload)
            assert message.step == len(self.kv[message.attempt])
            asyncio.get_running_loop().call_soon(self._answer, message)

    def _answer(self, feed: m.Feed) -> None:
        assert self.run is not None
        if self.before_answer(self, feed.step):
            token = following(self.kv[feed.attempt])
            self.run.deliver(TokenArrived(Attempt(feed.attempt), feed.step, token, None))

    def release(self, lease: Lease) -> None:
        self.released.append(lease)

    def progressed(self, lease: Lease, tokens: int) -> None:
        assert lease is self.leases[-1]
        self.grown.append(tokens)

    def step_took_too_long(self, lease: Lease, waited_s: float) -> None:
        assert lease is self.leases[-1]
        self.waited_s.append(waited_s)

    def breaks(self, code: str) -> None:
        assert self.run is not None
        self.run.deliver(Broken(self.leases[-1].attempt, code, "as told"))


@dataclass
class World:
    run: SequenceRun
    workers: Workers
    events: list[Event]

    @property
    def tokens(self) -> list[int]:
        return [token.id for event in self.events if isinstance(event, Delta) for token in event.tokens]


def world(
    prompt: tuple[int, ...] = (1, 2, 3), max_tokens: int = 5, *, workers: Workers | None = None,
    limits: SequenceLimits = SOON, emit: Callable[[Event], Awaitable[None]] | None = None, **fields: object,
) -> World:  # fmt: skip
    request = GenerationRequest(RequestId("r"), prompt, 1, max_tokens, SAMPLING)
    request = replace(request, **fields)  # type: ignore[arg-type]
    events: list[Event] = []

    async def keep(event: Event) -> None:
        events.append(event)

    workers = workers or Workers()
    text = ChoiceText(0, max_tokens, request.stop_token_ids, request.stop, Letters())
    return World(
        SequenceRun(SequenceId(9), request, 0, text, max_tokens, workers, limits, emit or keep), workers, events
    )


async def test_one_route_from_the_prompt_to_the_end() -> None:
    made = world()
    await made.run.run()
    assert made.tokens == continued((1, 2, 3), 5)
    assert made.events[-1] == Finished(0, "length", 5)
    assert made.workers.leases == made.workers.released
    assert [(feed.start, feed.step, feed.sample) for feed in made.workers.feeds] == [
        (0, 3, True), (3, 4, True), (4, 5, True), (5, 6, True), (6, 7, True)
    ]  # fmt: skip
    assert made.workers.grown == [4, 5, 6, 7, 8]


async def test_every_hop_is_opened_and_only_the_last_knows_the_sampling() -> None:
    made = world()
    await made.run.run()
    first, last = made.workers.opens
    assert (first.start, first.end, first.next_node, first.sampling, first.prompt_tokens) == (0, 2, "b", None, 3)
    assert (last.start, last.end, last.next_node, last.sampling, last.prompt_tokens) == (2, 4, "", SAMPLING, 3)


async def test_what_is_emitted_is_fed_again_on_the_next_route_and_not_emitted_again() -> None:
    def before(workers: Workers, step: int) -> bool:
        if step == 6 and len(workers.leases) == 1:
            workers.breaks("peer_lost")
            return False
        return True

    made = world(workers=Workers(before))
    await made.run.run()
    assert made.tokens == continued((1, 2, 3), 5)
    assert made.run.migrations == 1
    again = [feed for feed in made.workers.feeds if feed.attempt == 1]
    assert (again[0].start, again[0].step) == (0, 6)
    assert made.workers.opens[3].prompt_tokens == 3, "the client's prompt stays what it was"
    assert made.workers.leases == made.workers.released
    assert made.events[-1] == Finished(0, "length", 5)


async def test_tokens_that_come_twice_or_from_an_older_attempt_are_not_taken() -> None:
    def before(workers: Workers, step: int) -> bool:
        run, attempt = workers.run, workers.leases[-1].attempt
        assert run is not None
        run.deliver(TokenArrived(attempt, step - 1, 250, None))
        run.deliver(TokenArrived(attempt, step + 1, 249, None))
        if attempt > 0:
            run.deliver(TokenArrived(Attempt(attempt - 1), step, 248, None))
            run.deliver(Broken(Attempt(attempt - 1), "peer_lost", "late news"))
        if step == 5 and attempt == 0:
            workers.breaks("moved")
        return True

    made = world(workers=Workers(before))
    await made.run.run()
    assert made.tokens == continued((1, 2, 3), 5)
    assert len(made.workers.leases) == 2


@pytest.mark.parametrize(
    ("code", "lost"), [("peer_lost", True), ("timeout", True), ("moved", False), ("draining", False)]
)
async def test_only_lost_routes_count_towards_giving_up(code: str, lost: bool) -> None:
    def before(workers: Workers, step: int) -> bool:
        if len(workers.leases) <= 4:
            workers.breaks(code)
            return False
        return True

    made = world(workers=Workers(before))
    if lost:
        with pytest.raises(PipelineLost, match=f"broke 4 times, the last time with {code}"):
            await made.run.run()
        assert len(made.workers.leases) == 4
    else:
        await made.run.run()
        assert made.tokens == continued((1, 2, 3), 5)
    assert made.workers.leases == made.workers.released


async def test_preemption_is_free_while_the_sequence_gets_on_and_not_for_ever_when_it_does_not() -> None:
    def one_token_each(workers: Workers, step: int) -> bool:
        if workers.kv[workers.leases[-1].attempt] == () or step == 3 + len(workers.leases):
            workers.breaks("kv_full")
            return False
        return True

    made = world(max_tokens=8, workers=Workers(one_token_each))
    await made.run.run()
    assert made.tokens == continued((1, 2, 3), 8)
    assert len(made.workers.leases) == 8

    def never(workers: Workers, step: int) -> bool:
        workers.breaks("kv_full")
        return False

    stuck = world(workers=Workers(never))
    with pytest.raises(PipelineLost, match="kv_full"):
        await stuck.run.run()
    assert stuck.workers.leases == stuck.workers.released


async def test_who_makes_room_for_others_is_never_given_up() -> None:
    def at_last(workers: Workers, step: int) -> bool:
        if len(workers.leases) < 20:
            workers.breaks("preempted")
            return False
        return True

    made = world(workers=Workers(at_last))
    await made.run.run()
    assert made.tokens == continued((1, 2, 3), 5)
    assert made.run.migrations == 0


async def test_silence_is_a_broken_route() -> None:
    def once(workers: Workers, step: int) -> bool:
        return len(workers.leases) > 1

    made = world(workers=Workers(once), limits=SequenceLimits(step_s=0.01, max_migrations=1))
    await made.run.run()
    assert made.tokens == continued((1, 2, 3), 5)
    assert made.run.last_break == "timeout: no token within 0.01 s from a -> b"
    assert made.workers.waited_s == [0.01]


async def test_prompts_that_are_computed_first_are_waited_for() -> None:
    """A short prompt behind long ones takes as long as they do; that is no fault of its route."""

    class Busy(Workers):
        async def acquire(self, run: SequenceRun) -> Lease:
            self.leases.append(replace(await super().acquire(run), ahead_tokens=1021 if len(self.leases) == 1 else 0))
            return self.leases[-1]

    made = world(
        workers=Busy(lambda workers, step: len(workers.leases) > 2 and step > 4),
        limits=SequenceLimits(step_s=0.01, max_migrations=2),
    )
    with pytest.raises(PipelineLost):
        await made.run.run()
    assert made.workers.waited_s[:2] == [0.02, 0.01]


async def test_a_worker_that_floods_costs_one_attempt_and_no_memory() -> None:
    def flood(workers: Workers, step: int) -> bool:
        if len(workers.leases) == 1:
            for _ in range(INBOX_LIMIT * 2):
                assert workers.run is not None
                workers.run.deliver(TokenArrived(Attempt(0), 999, 1, None))
        return True

    made = world(workers=Workers(flood))
    await made.run.run()
    assert made.tokens == continued((1, 2, 3), 5)
    assert made.run.last_break.startswith("overflow")


async def test_cancelled_anywhere_the_route_is_given_back() -> None:
    made = world(max_tokens=10_000)
    task = asyncio.create_task(made.run.run())
    while len(made.tokens) < 20:
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait({task})
    assert made.workers.leases == made.workers.released
    assert len(made.workers.leases) == 1


async def test_a_cut_through_many_links_counts_once_until_a_token_has_come() -> None:
    """A partition takes links one by one, as they are found out; several may hit the same sequence in a second."""

    def cut_through_all(workers: Workers, step: int) -> bool:
        if len(workers.leases) <= 6:
            workers.breaks(LINK_CUT)
            return False
        return True

    made = world(workers=Workers(cut_through_all))
    await made.run.run()
    assert made.tokens == continued((1, 2, 3), 5)
    assert (made.run.attempts, made.run.migrations) == (7, 1)

    def a_token_each(workers: Workers, step: int) -> bool:
        if step == 3 + len(workers.leases):
            workers.breaks(LINK_CUT)
            return False
        return True

    flapping = world(max_tokens=8, workers=Workers(a_token_each))
    with pytest.raises(PipelineLost, match=f"broke 4 times, the last time with {LINK_CUT}"):
        await flapping.run.run()


async def test_a_worker_that_says_there_is_no_link_is_not_believed_for_ever() -> None:
    def always(workers: Workers, step: int) -> bool:
        workers.breaks("link_lost")
        return False

    made = world(workers=Workers(always))
    with pytest.raises(PipelineLost, match="broke 4 times"):
        await made.run.run()


async def test_a_route_that_breaks_before_its_first_word_is_left_at_once() -> None:
    made = world(workers=Workers(break_at_grant=["peer_lost"]), limits=SequenceLimits(step_s=60.0, max_migrations=1))
    async with asyncio.timeout(5):
        await made.run.run()
    assert made.tokens == continued((1, 2, 3), 5)
    assert made.workers.leases == made.workers.released
    assert made.run.attempts == 2


async def test_cancelled_between_the_grant_and_the_first_word_the_route_is_given_back() -> None:
    made = world()
    task = asyncio.create_task(made.run.run())
    while not made.workers.leases:
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait({task})
    assert made.workers.feeds == []
    assert made.workers.leases == made.workers.released


async def test_a_client_that_does_not_read_holds_no_route_that_is_wanted_back() -> None:
    reads, seen = asyncio.Event(), []

    async def slow(event: Event) -> None:
        seen.append(event)
        await reads.wait()

    made = world(emit=slow)
    task = asyncio.create_task(made.run.run())
    while not seen:
        await asyncio.sleep(0)
    assert made.workers.released == []
    made.workers.breaks("kv_full")
    assert made.workers.released == made.workers.leases
    reads.set()
    async with asyncio.timeout(5):
        await task
    assert [t.id for e in seen if isinstance(e, Delta) for t in e.tokens] == continued((1, 2, 3), 5)
    assert len(made.workers.leases) == 2
    assert made.workers.leases == made.workers.released


async def test_a_stop_token_and_a_stop_string_end_it() -> None:
    tokens = continued((1, 2, 3), 5)
    by_token = world(stop_token_ids=(tokens[2],))
    await by_token.run.run()
    assert by_token.events[-1] == Finished(0, "stop", 3)
    by_text = world(stop=(f"<{tokens[2]}>",))
    await by_text.run.run()
    assert by_text.events[-1] == Finished(0, "stop", 3)
    text = "".join(event.text for event in by_text.events if isinstance(event, Delta))
    assert text == f"<{tokens[0]}><{tokens[1]}>"


def scoring(break_at: int | None = None, chunk: int = 2) -> Workers:
    """Workers that score the prompt in chunks before they draw, as a last hop does; may break after one chunk."""

    def before(workers: Workers, step: int) -> bool:
        run, lease = workers.run, workers.leases[-1]
        assert run is not None
        if workers.opens[-1].score:
            for start in range(1, len(run.prompt), chunk):
                if start >= 3 and break_at == lease.attempt:
                    workers.breaks("peer_lost")
                    return False
                scores = [TokenLogprobs(-float(at)) for at in range(start, min(start + chunk, len(run.prompt)))]
                run.deliver(ScoresArrived(lease.attempt, start, tuple(scores)))
        return workers.feeds[-1].sample

    return Workers(before)


@pytest.mark.parametrize("max_tokens", [0, 1, 4])
@pytest.mark.parametrize("prompt", [(1,), (1, 2), (1, 2, 3, 4, 5, 6)])
@pytest.mark.parametrize("break_at", [None, 0])
async def test_the_prompt_is_scored_once_and_before_any_text(
    max_tokens: int, prompt: tuple[int, ...], break_at: int | None
) -> None:
    made = world(prompt, max_tokens, workers=scoring(break_at), prompt_logprobs=True)
    async with asyncio.timeout(5):
        await made.run.run()
    scores = tuple(TokenLogprobs(-float(at)) for at in range(1, len(prompt)))
    assert made.events[0] == PromptScored((None, *scores))
    assert sum(isinstance(event, PromptScored) for event in made.events) == 1
    assert made.tokens == continued(prompt, max_tokens)
    assert made.events[-1] == Finished(0, "length", max_tokens)
    assert made.workers.leases == made.workers.released


async def test_only_the_first_choice_scores_the_prompt() -> None:
    request = GenerationRequest(RequestId("r"), (1, 2), 2, 0, SAMPLING, prompt_logprobs=True)
    events: list[Event] = []

    async def keep(event: Event) -> None:
        events.append(event)

    text = ChoiceText(1, 0, (), (), Letters())
    await SequenceRun(SequenceId(9), request, 1, text, 0, Workers(), SOON, keep).run()
    assert events == [Finished(1, "length", 0)]


codes = st.sampled_from(["peer_lost", "link_lost", LINK_CUT, "kv_full", "preempted", "moved", "draining", "compute"])


@settings(max_examples=150, deadline=None)
@given(
    prompt=st.lists(st.integers(0, 50), min_size=1, max_size=6),
    max_tokens=st.integers(1, 12),
    trouble=st.dictionaries(st.integers(0, 30), st.tuples(codes, st.booleans()), max_size=6),
    scored=st.booleans(),
)
async def test_whatever_breaks_the_answer_is_that_of_a_quiet_run(
    prompt: list[int], max_tokens: int, trouble: dict[int, tuple[str, bool]], scored: bool
) -> None:
    """`trouble`: at the nth answer the route breaks, before or after the token is out."""
    answers = 0
    score = scoring().before_answer

    def before(workers: Workers, step: int) -> bool:
        nonlocal answers
        answers += 1
        answered = score(workers, step)
        if answers in trouble:
            code, with_token = trouble[answers]
            if not with_token:
                workers.breaks(code)
                return False
            asyncio.get_running_loop().call_soon(workers.breaks, code)
        return answered

    ids = tuple(prompt)
    made = world(ids, max_tokens, workers=Workers(before), limits=SequenceLimits(5.0, 10), prompt_logprobs=scored)
    async with asyncio.timeout(5):
        await made.run.run()
    assert made.tokens == continued(ids, max_tokens)
    assert made.events[-1] == Finished(0, "length", max_tokens)
    assert made.workers.leases == made.workers.released
    assert isinstance(made.events[0], PromptScored) == scored
