"""A node at work with an engine that only keeps books: what leaves it, and that nothing stays behind."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
import torch

from helixd.engine.types import SequenceSpec, StageResult, StageWork
from helixd.errors import OutOfKv
from helixd.ids import Epoch, NodeId, SequenceId
from helixd.layers import LayerRange
from helixd.protocol import messages as m
from helixd.protocol.codec import pack_ids, to_frame
from helixd.sampling import SamplingParams, TokenLogprobs
from helixd.wire.frames import encode_small_head
from helixd.wire.options import WireOptions
from helixd.worker.batcher import BatchLimits, Pass
from helixd.worker.compute import NodeCompute
from helixd.worker.node import NodeRuntime
from helixd.worker.results import tokens
from helixd.worker.steps import DrawnToken
from helixd.worker.threads import ComputeThread

HIDDEN = 2
FIRST = LayerRange(0, 2)
LAST = LayerRange(2, 4)
WHOLE = LayerRange(0, 4)
GREEDY = SamplingParams(seed=0, temperature=0.0)
ROW_BYTES = HIDDEN * 4


class BookEngine:
    """An engine of which only the books are real: the next token is the number of positions so far."""

    def __init__(self, last_layer: int = 4) -> None:
        self.open_now: dict[SequenceId, SequenceSpec] = {}
        self.lengths: dict[SequenceId, int] = {}
        self.batches: list[list[StageWork]] = []
        self.full: set[int] = set()  # lengths at which there is no room
        self.kv_used_token_layers = self.kv_capacity_token_layers = 0
        self.layers_s = 0.0
        self._last_layer = last_layer

    def open(self, spec: SequenceSpec) -> None:
        assert spec.id not in self.open_now
        if spec.prompt_tokens == 666:
            raise ValueError("the prefix has a token outside the vocabulary")
        self.open_now[spec.id] = spec
        self.lengths[spec.id] = 0

    def close(self, sequence: SequenceId) -> None:
        self.open_now.pop(sequence, None)

    def forward(self, batch: Sequence[StageWork]) -> list[StageResult]:
        for work in batch:
            assert work.sequence in self.open_now
            if work.start != self.lengths[work.sequence]:
                raise ValueError(f"sequence {work.sequence}: work starts at {work.start}")
            if self.lengths[work.sequence] in self.full:
                raise OutOfKv("full", work.sequence)
        self.batches.append(list(batch))
        return [self._result(work) for work in batch]

    def _result(self, work: StageWork) -> StageResult:
        n = len(work.token_ids) if work.token_ids is not None else len(work.hidden)  # type: ignore[arg-type]
        self.lengths[work.sequence] += n
        if self.open_now[work.sequence].layers.end < self._last_layer:
            rows = torch.arange(work.start, work.start + n, dtype=torch.float32)
            return StageResult(work.sequence, hidden=rows.repeat_interleave(HIDDEN).view(n, HIDDEN))
        scores = work.score and tuple(None if s is None else TokenLogprobs(-float(s)) for s in work.score)
        token = self.lengths[work.sequence] if work.sample else None
        return StageResult(work.sequence, token=token, scores=scores)


@dataclass
class Mailbox:
    """Takes what leaves the node."""

    told: list[m.Message] = field(default_factory=list)
    rows: list[tuple[NodeId, m.Activations, list[float]]] = field(default_factory=list)
    reachable: bool = True
    busy: bool = False

    def to_coordinator(self, message: m.Message) -> None:
        self.told.append(message)

    def to_node(self, node: NodeId, message: m.Activations, payload: memoryview, *, urgent: bool) -> bool:
        assert urgent == all(part.n == 1 for part in message.parts)
        if self.reachable:
            self.rows.append((node, message, memoryview(bytes(payload)).cast("f").tolist()[::HIDDEN]))
        return self.reachable

    def congested(self, node: NodeId) -> bool:
        return self.busy

    def of(self, kind: type[m.Message]) -> list[m.Message]:
        return [message for message in self.told if isinstance(message, kind)]


@dataclass
class World:
    node: NodeRuntime
    engine: BookEngine
    mail: Mailbox

    async def quiet(self) -> None:
        """Until nothing has been left to do for a few turns of the loop."""
        idle = 0
        async with asyncio.timeout(5):
            while idle < 5:
                await asyncio.sleep(0.001)
                busy = self.node.queued_tokens or self.node.oldest_work_age_s()
                idle = 0 if busy and not self.mail.busy else idle + 1

    def feed(self, sequence: int, start: int, n: int, *, attempt: int = 0, epoch: int = 1, sample: bool = True) -> None:
        ids = pack_ids(range(start, start + n))
        self.node.on_feed(m.Feed(epoch, sequence, attempt, "me", start + n, start, sample), ids)

    def pass_rows(self, *parts: m.Part, incarnation: int = 7, epoch: int = 1, missing: int = 0) -> str | None:
        payload = bytearray(sum(part.n for part in parts) * ROW_BYTES - missing)
        return self.node.on_activations(m.Activations(incarnation, epoch, "me", list(parts)), memoryview(payload))


def opening(
    sequence: int, layers: LayerRange, *, attempt: int = 0, epoch: int = 1, prompt: int = 4, score: bool = False
) -> tuple[m.Open, memoryview | None]:
    last = layers.end == 4
    return (
        m.Open(
            epoch, sequence, attempt, "me", layers.start, layers.end, "" if last else "next", prompt,
            GREEDY if last else None, score,
        ),
        pack_ids(range(prompt)) if last else None,
    )  # fmt: skip


@asynccontextmanager
async def at_work(layers: LayerRange = WHOLE, max_tokens: int | None = None) -> AsyncIterator[World]:
    thread = ComputeThread("test")
    engine, mail = BookEngine(), Mailbox()
    compute = NodeCompute(engine, HIDDEN, "float32")  # type: ignore[arg-type]
    node = NodeRuntime(NodeId("me"), thread, compute, BatchLimits(8, 16, 8), mail, max_tokens)
    node.incarnation = 7  # type: ignore[assignment]
    node.serve_epoch(Epoch(1), layers)
    task = asyncio.create_task(node.run())
    try:
        yield World(node, engine, mail)
    finally:
        task.cancel()
        await asyncio.wait({task})
        thread.close()
        if not task.cancelled():
            task.result()


async def test_a_sequence_is_fed_drawn_and_closed() -> None:
    async with at_work() as world:
        world.node.on_open(*opening(5, WHOLE))
        world.feed(5, 0, 4)
        await world.quiet()
        assert world.mail.of(m.Tokens) == [m.Tokens("me", [m.Drawn(5, 0, 4, 4)])]
        world.feed(5, 4, 1)
        await world.quiet()
        assert world.mail.of(m.Tokens)[1] == m.Tokens("me", [m.Drawn(5, 0, 5, 5)])
        world.node.on_close(m.Close(5, 0, "me"))
        await world.quiet()
        assert world.mail.told[2:] == [m.Closed(5, 0, "me")]
        assert world.engine.open_now == {}
        assert world.node.open_sequences == 0


async def test_opened_and_closed_before_anything_ran_leaves_nothing_open() -> None:
    """An attempt can be given up before the node has got round to it."""
    async with at_work() as world:
        world.node.on_open(*opening(5, WHOLE))
        world.feed(5, 0, 4)
        world.node.on_close(m.Close(5, 0, "me"))
        await world.node.settled()
        assert world.engine.open_now == {}
        assert world.mail.told == [m.Closed(5, 0, "me")]
        world.node.on_open(*opening(6, WHOLE))
        world.node.on_open(*opening(6, WHOLE, attempt=1))
        world.feed(6, 0, 4, attempt=1)
        await world.quiet()
        assert len(world.engine.open_now) == 1
        assert world.mail.told[1:] == [m.Closed(6, 0, "me"), m.Tokens("me", [m.Drawn(6, 1, 4, 4)])]


async def test_rows_go_on_with_their_identity_and_only_the_last_chunk_draws() -> None:
    async with at_work() as world:
        world.node.on_open(*opening(5, FIRST, prompt=20))
        world.feed(5, 0, 20)
        await world.quiet()
        parts = [(message.incarnation, message.epoch, *message.parts) for _, message, _ in world.mail.rows]
        assert parts == [
            (7, 1, m.Part(5, 0, 20, 0, 8, False)),
            (7, 1, m.Part(5, 0, 20, 8, 8, False)),
            (7, 1, m.Part(5, 0, 20, 16, 4, True)),
        ]
        assert [row for *_, rows in world.mail.rows for row in rows] == [float(at) for at in range(20)]
        assert {to for to, *_ in world.mail.rows} == {"next"}


async def test_activations_before_their_open_and_out_of_order_are_run_in_order() -> None:
    async with at_work() as world:
        assert world.pass_rows(m.Part(5, 0, 4, 2, 2, True)) is None
        world.node.on_open(*opening(5, LAST))
        await world.quiet()
        assert world.mail.told == []
        world.pass_rows(m.Part(5, 0, 4, 0, 2, False))
        await world.quiet()
        assert [(w.start, w.sample) for batch in world.engine.batches for w in batch] == [(0, False), (2, True)]
        assert world.mail.told == [m.Tokens("me", [m.Drawn(5, 0, 4, 4)])]


async def test_stale_frames_are_dropped_and_counted() -> None:
    async with at_work() as world:
        node = world.node
        node.on_open(*opening(5, LAST, attempt=1))
        world.pass_rows(m.Part(5, 1, 1, 0, 1, True), incarnation=6)
        world.pass_rows(m.Part(5, 0, 1, 0, 1, True))
        world.pass_rows(m.Part(9, 0, 1, 0, 1, True), epoch=2)
        assert node.stale_frames == 3
        world.feed(5, 0, 1, attempt=1)
        assert node.stale_frames == 4, "ids for a sequence that enters in the middle"
        world.pass_rows(m.Part(5, 1, 1, 0, 1, True))
        world.pass_rows(m.Part(5, 1, 1, 0, 1, True))
        assert node.stale_frames == 5
        node.on_open(*opening(5, LAST, attempt=1))
        node.on_open(*opening(5, LAST, attempt=0))
        assert node.stale_frames == 7
        node.on_close(m.Close(5, 1, "me"))
        world.pass_rows(m.Part(5, 1, 2, 1, 1, True))
        node.on_open(*opening(5, LAST, attempt=1))
        assert node.stale_frames == 9
        await world.quiet()
        assert world.engine.open_now == {}
        assert world.mail.of(m.StageFailed) == []


async def test_a_frame_of_the_wrong_size_is_named_and_does_nothing() -> None:
    async with at_work() as world:
        world.node.on_open(*opening(5, LAST))
        wrong = world.pass_rows(m.Part(5, 0, 2, 0, 2, True), missing=1)
        assert wrong == "activations of 2 rows x 8 B came with 15 B"
        await world.quiet()
        assert world.engine.batches == []


@pytest.mark.parametrize(("epoch", "layers"), [(2, LAST), (1, LayerRange(0, 3))])
async def test_a_route_that_this_node_does_not_serve_fails_at_once(epoch: int, layers: LayerRange) -> None:
    async with at_work(LAST) as world:
        world.node.on_open(*opening(5, layers, epoch=epoch))
        (failed,) = world.mail.told
        assert isinstance(failed, m.StageFailed)
        assert (failed.sequence, failed.code) == (5, "stale_epoch")


async def test_closing_what_was_never_open_is_answered_and_keeps_it_closed() -> None:
    async with at_work() as world:
        world.node.on_close(m.Close(5, 2, "me"))
        assert world.mail.told == [m.Closed(5, 2, "me")]
        world.node.on_open(*opening(5, LAST, attempt=2))
        assert world.node.open_sequences == 0


async def test_no_kv_room_fails_that_sequence_and_the_others_go_on() -> None:
    async with at_work() as world:
        for sequence in (5, 6):
            world.node.on_open(*opening(sequence, WHOLE))
        world.feed(5, 0, 4)
        await world.quiet()
        world.engine.full = {4}
        world.feed(5, 4, 1)
        world.feed(6, 0, 3)
        await world.quiet()
        (failed,) = world.mail.of(m.StageFailed)
        assert isinstance(failed, m.StageFailed)
        assert (failed.sequence, failed.code) == (5, "kv_full")
        assert world.mail.of(m.Tokens)[1:] == [m.Tokens("me", [m.Drawn(6, 0, 3, 3)])]
        assert world.mail.of(m.Closed) == [m.Closed(5, 0, "me")]
        assert world.node.open_sequences == len(world.engine.open_now) == 1


async def test_nonsense_fails_the_sequence_that_sent_it_alone() -> None:
    async with at_work() as world:
        world.node.on_open(*opening(4, WHOLE, prompt=666))
        world.feed(4, 0, 4)
        for sequence in (5, 6):
            world.node.on_open(*opening(sequence, WHOLE))
            world.feed(sequence, 0, 4)
        await world.quiet()
        assert [(f.sequence, f.code) for f in world.mail.of(m.StageFailed)] == [(4, "compute")]  # type: ignore[attr-defined]
        drawn = [each.sequence for tokens in world.mail.of(m.Tokens) for each in tokens.drawn]  # type: ignore[attr-defined]
        assert drawn == [5, 6]


async def test_no_link_to_the_next_hop_fails_the_sequences_that_need_it() -> None:
    async with at_work() as world:
        world.mail.reachable = False
        world.node.on_open(*opening(5, FIRST))
        world.node.on_open(*opening(6, WHOLE))
        world.feed(5, 0, 4)
        await world.quiet()
        assert [(f.sequence, f.code) for f in world.mail.of(m.StageFailed)] == [(5, "link_lost")]  # type: ignore[attr-defined]
        world.node.on_open(*opening(7, FIRST))
        world.node.on_link_lost(lambda node: False)
        assert [f.sequence for f in world.mail.of(m.StageFailed)] == [5, 7]  # type: ignore[attr-defined]
        await world.quiet()
        assert world.node.open_sequences == 1


async def test_a_congested_hop_holds_prefill_until_it_is_woken() -> None:
    async with at_work() as world:
        world.mail.busy = True
        world.node.on_open(*opening(5, FIRST))
        world.feed(5, 0, 4)
        await world.quiet()
        assert world.mail.rows == []
        world.mail.busy = False
        world.node.wake()
        await world.quiet()
        assert len(world.mail.rows) == 1


async def test_a_retired_epoch_takes_its_sequences_along() -> None:
    async with at_work() as world:
        world.node.serve_epoch(Epoch(2), WHOLE)
        world.node.on_open(*opening(5, WHOLE, epoch=1))
        world.node.on_open(*opening(6, WHOLE, epoch=2))
        world.node.retire_below(Epoch(2))
        await world.node.settled()
        assert world.node.open_sequences == 1
        assert world.mail.told == [m.Closed(5, 0, "me")]
        world.feed(5, 0, 4)
        assert world.node.stale_frames == 1
        world.node.forget_all()
        await world.node.settled()
        assert world.engine.open_now == {}


async def test_scores_of_the_prompt_are_sent_from_its_second_token_on() -> None:
    async with at_work() as world:
        world.node.on_open(*opening(5, WHOLE, prompt=12, score=True))
        world.feed(5, 0, 12)
        await world.quiet()
        sent = [(s.start, [lp for lp, _ in s.scores]) for s in world.mail.of(m.Scores)]  # type: ignore[attr-defined]
        assert sent == [(1, [-float(at) for at in range(1, 9)]), (9, [-9.0, -10.0, -11.0])]
        assert isinstance(world.mail.told[-1], m.Tokens), "the token comes after the scores"


async def test_a_node_that_never_rests_still_settles() -> None:
    """Layers are unloaded once what was closed is closed in the engine; under load there is always a next step."""
    async with at_work() as world:
        node, post, at = world.node, world.mail.to_coordinator, 0
        node.on_open(*opening(1, WHOLE))
        node.on_open(*opening(2, WHOLE))
        world.feed(2, 0, 4)

        def asks_for_the_next(message: m.Message) -> None:
            nonlocal at
            post(message)
            if isinstance(message, m.Tokens) and any(drawn.sequence == 1 for drawn in message.drawn):
                at += 1
                world.feed(1, at, 1)

        world.mail.to_coordinator = asks_for_the_next  # type: ignore[method-assign]
        world.feed(1, 0, 1)
        while at < 3:
            await asyncio.sleep(0)
        node.on_close(m.Close(2, 0, "me"))
        async with asyncio.timeout(5):
            await node.settled()
        assert [spec.prompt_tokens for spec in world.engine.open_now.values()] == [4]
        assert node.oldest_work_age_s() > 0, "it rests"
        world.mail.to_coordinator = post  # type: ignore[method-assign]


async def test_the_tokens_of_a_large_batch_fit_into_messages_with_all_that_may_be_asked_for() -> None:
    async with at_work() as world:
        best = TokenLogprobs(-1.25, tuple((150_000 + at, -1.5 - at) for at in range(20)))
        drawn = []
        for handle in range(1, 513):
            world.node.on_open(*opening(1 << 40 | handle, WHOLE))
            drawn.append(DrawnToken(Pass(SequenceId(handle), 99_999, 99_998, 1, True, 0.0), 150_000, best))
        messages = list(tokens(world.node._book, world.node.node, drawn))
        assert sum(len(message.drawn) for message in messages) == 512
        for message in messages:
            encode_small_head(message.KIND, to_frame(message).body, None, WireOptions().max_body_bytes)


async def test_rows_that_no_context_has_are_not_kept() -> None:
    async with at_work(LAST, max_tokens=16) as world:
        world.node.on_open(*opening(5, LAST, prompt=16))
        world.pass_rows(m.Part(5, 0, 17, 0, 17, False))
        world.pass_rows(m.Part(5, 0, 17, 16, 1, False), m.Part(6, 0, 17, 16, 1, False))
        assert world.node.stale_frames == 3
        world.pass_rows(m.Part(5, 0, 16, 0, 16, True))
        await world.quiet()
        assert world.node.stale_frames == 3
        assert world.mail.of(m.Tokens) == [m.Tokens("me", [m.Drawn(5, 0, 16, 16)])]
