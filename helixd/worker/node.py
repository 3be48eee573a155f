"""One node at work: its sequences, its queue of passes, its compute thread, and where results go.

The loop takes the batch that is due, has it computed in the node's thread, posts rows to next hops and tokens to the
coordinator. It never waits for a socket: what cannot be sent yet holds back prefill through `Post.congested`. A
sequence that cannot go on here is reported, never silently lost; who recovers it is the coordinator.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Protocol

from helixd import logs
from helixd.engine.types import SequenceSpec
from helixd.ids import Attempt, Epoch, Incarnation, NodeId, SequenceId
from helixd.layers import LayerRange
from helixd.protocol.codec import unpack_ids
from helixd.protocol.messages import (
    Activations,
    Close,
    Closed,
    Feed,
    Message,
    Open,
    StageFailed,
    brief,
)
from helixd.worker.backend import StageCompute
from helixd.worker.batcher import Batcher, BatchLimits, Pass
from helixd.worker.gauge import Expected, Slowdown, SpeedGauge
from helixd.worker.inbox import Early, LocalSequence, SequenceBook
from helixd.worker.pace import StepPace
from helixd.worker.results import activations, following_ids, scores, tokens
from helixd.worker.steps import ScoredPass, Step, StepOutcome
from helixd.worker.threads import ComputeThread

log = logging.getLogger(__name__)


class Post(Protocol):
    """How a node's results leave it. Nothing here waits."""

    def to_coordinator(self, message: Message) -> None:
        """Queue a message for the coordinator (dropped if there is none: it has forgotten our sequences)."""
        ...

    def to_node(self, node: NodeId, message: Activations, payload: memoryview, *, urgent: bool) -> bool:
        """Queue activations for another node, ahead of what is not urgent; False if there is no link to it."""
        ...

    def congested(self, node: NodeId) -> bool:
        """Whether prefill rows for that node should wait."""
        ...


class NodeRuntime:
    """The one owner of a node's sequences. All methods run on the event loop; computing does not.

    `max_tokens`: how long a sequence may be; rows beyond that are not kept (None: whatever the engine says).
    """

    def __init__(
        self, node: NodeId, thread: ComputeThread, compute: StageCompute, limits: BatchLimits, post: Post,
        max_tokens: int | None = None,
    ) -> None:  # fmt: skip
        self.node = node
        self.thread = thread
        self.compute = compute
        self.incarnation = Incarnation(0)
        self.steps_done = 0
        self.gauge: SpeedGauge | None = None
        self._post = post
        self._max_tokens = max_tokens
        self._batcher = Batcher(limits)
        self._book = SequenceBook()
        self._live_epochs: dict[Epoch, LayerRange] = {}
        self._opens: list[SequenceSpec] = []
        self._closes: list[tuple[SequenceId, LocalSequence]] = []
        self._work = asyncio.Event()
        self._pace = StepPace()
        self._stepped = asyncio.Event()

    # -- what the worker's session says ------------------------------------------------------------------------------

    def serve_epoch(self, epoch: Epoch, layers: LayerRange) -> None:
        """From now on sequences of `epoch` may run here."""
        self._live_epochs[epoch] = layers

    def retire_below(self, epoch: Epoch) -> None:
        """Epochs below `epoch` are dead: their sequences end without an answer."""
        self._live_epochs = {e: layers for e, layers in self._live_epochs.items() if e >= epoch}
        for local in self._book:
            if local.epoch < epoch:
                self._end(local)

    def forget_all(self) -> None:
        """The coordinator is gone: free every sequence, keep the layers."""
        self._live_epochs.clear()
        for local in self._book:
            self._end(local)

    def on_open(self, message: Open, payload: memoryview | None) -> None:
        """A sequence will come by."""
        sequence, attempt, epoch = SequenceId(message.sequence), Attempt(message.attempt), Epoch(message.epoch)
        if self._book.is_over(sequence, attempt) or self._book.get(sequence, attempt) is not None:
            self._book.stale_frames += 1
            return
        held = self._live_epochs.get(epoch)
        if held is None or not (held.start <= message.start < message.end <= held.end):
            why = f"epoch {epoch} is not served here" if held is None else f"this node holds {held}"
            self._fail(sequence, attempt, "stale_epoch", why)
            return
        local = LocalSequence(
            handle=self._book.new_handle(),
            sequence=sequence,
            attempt=attempt,
            epoch=epoch,
            layers=LayerRange(message.start, message.end),
            next_node=NodeId(message.next_node) if message.next_node else None,
            prompt_tokens=message.prompt_tokens,
            score=message.score,
            prefix=unpack_ids(payload),
        )
        replaced = self._book.open(local)
        if replaced is not None:
            self._discard(replaced)
        self._opens.append(
            SequenceSpec(local.handle, local.layers, local.prompt_tokens, message.sampling, local.prefix)
        )
        for item in self._book.take_early(sequence, attempt):
            self._accept(local, item)

    def on_feed(self, message: Feed, payload: memoryview | None) -> None:
        """Token ids for a sequence that enters here."""
        ids = unpack_ids(payload)
        if not ids:
            self._book.stale_frames += 1
            return
        item = Pass(
            SequenceId(0), message.step, message.start, len(ids), message.sample, self._now(), token_ids=ids
        )  # fmt: skip
        self._arrive(SequenceId(message.sequence), Attempt(message.attempt), Epoch(message.epoch), item)

    def on_activations(self, message: Activations, payload: memoryview | None) -> str | None:
        """Rows from the hop before. Returns what is wrong with the frame, None if it is sound."""
        if message.incarnation != self.incarnation:
            self._book.stale_frames += 1
            return None
        rows = sum(part.n for part in message.parts)
        row_bytes = self.compute.row_bytes
        if payload is None or len(payload) != rows * row_bytes:
            have = 0 if payload is None else len(payload)
            return f"activations of {rows} rows x {row_bytes} B came with {have} B"
        at = 0
        for part in message.parts:
            piece = payload[at : at + part.n * row_bytes]
            at += part.n * row_bytes
            item = Pass(SequenceId(0), part.step, part.start, part.n, part.sample, self._now(), rows=piece)
            self._arrive(SequenceId(part.sequence), Attempt(part.attempt), Epoch(message.epoch), item)
        return None

    def on_close(self, message: Close) -> None:
        """Forget an attempt and free its KV; always answered."""
        sequence, attempt = SequenceId(message.sequence), Attempt(message.attempt)
        local = self._book.close(sequence, attempt)
        if local is None:
            self._post.to_coordinator(Closed(sequence, attempt, self.node))
        else:
            self._discard(local)

    def on_link_lost(self, reaches: Callable[[NodeId], bool]) -> None:
        """A peer went away: sequences whose next hop cannot be reached any more fail here."""
        for local in self._book:
            if local.next_node is not None and not reaches(local.next_node):
                self._fail_local(local, "link_lost", f"no link to {local.next_node}")

    async def settled(self) -> None:
        """Wait until what was closed so far is closed in the engine too: at the next step's end at the latest."""
        # Not until nothing runs: under load a step begins as soon as the one before it has ended.
        enough = self.steps_done + (self._pace.started_s is not None) + bool(self._closes)
        while self.steps_done < enough:
            self._stepped.clear()
            await self._stepped.wait()

    def tidy(self) -> None:
        """Drop what came early and has waited too long; called now and then, for an idle node makes no steps."""
        self._book.expire_early(self._now())

    def wake(self) -> None:
        """Something that held passes back has changed."""
        self._work.set()

    # -- what others see ---------------------------------------------------------------------------------------------

    @property
    def limits(self) -> BatchLimits:
        """What a step may hold; the next one goes by it."""
        return self._batcher.limits

    @limits.setter
    def limits(self, limits: BatchLimits) -> None:
        self._batcher.limits = limits

    @property
    def open_sequences(self) -> int:
        """Attempts that are open here."""
        return len(self._book)

    @property
    def queued_tokens(self) -> int:
        """Rows that wait to be computed."""
        return self._batcher.queued_tokens

    @property
    def stale_frames(self) -> int:
        """Frames dropped for a stale identity, since the start."""
        return self._book.stale_frames

    def oldest_work_age_s(self) -> float:
        """How long the oldest queued or running pass has waited; 0 when idle."""
        starts = [at for at in (self._batcher.oldest_arrival_s(), self._pace.started_s) if at is not None]
        return self._now() - min(starts) if starts else 0.0

    def slowdown(self) -> Slowdown:
        """How much slower than measured the device is lately."""
        return Slowdown(None, None) if self.gauge is None else self.gauge.slowdown(self._now())

    def overdue(self, limit_s: float) -> float | None:
        """The age of a step that takes longer than any that ends, in seconds; None while all is well."""
        return self._pace.overdue(self._now(), limit_s)

    def excuse(self, seconds: float) -> None:
        """The whole process stood still for so long."""
        self._pace.excuse(seconds)

    # -- the loop ----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Compute what comes until cancelled."""
        while True:
            step, closed, expected = self._next_step()
            if step is None:
                self._work.clear()
                await self._work.wait()
                continue
            self._pace.begin(self._now())
            outcome = await self.thread.run(self.compute.run, step)
            self._pace.end(self._now())
            self.steps_done += 1
            if self.gauge is not None and expected is not None and not (outcome.failed or outcome.out_of_kv):
                self.gauge.took(expected, outcome.layers_s, self._now())
            self._stepped.set()
            for local in closed:
                self._post.to_coordinator(Closed(local.sequence, local.attempt, self.node))
            self._deliver(outcome)
            self.tidy()

    def _next_step(self) -> tuple[Step | None, list[LocalSequence], Expected | None]:
        closing, opens = self._closes, tuple(self._opens)
        batch = self._batcher.next_batch(self._held_back)
        if not (closing or opens or batch):
            return None, [], None
        self._closes, self._opens = [], []
        locals_ = [self._book.by_handle(item.handle) for item in batch]
        passes = tuple(
            ScoredPass(item, following_ids(local, item)) for item, local in zip(batch, locals_, strict=True)
        )  # fmt: skip
        groups = tuple((local and local.next_node) or "" for local in locals_)
        step = Step(tuple(handle for handle, _ in closing), opens, passes, groups)
        work = [(local.layers, item.n) for item, local in zip(batch, locals_, strict=True) if local is not None]
        expected = self.gauge.expected(work) if self.gauge is not None and batch else None
        return step, [local for _, local in closing], expected

    def _held_back(self, handle: SequenceId) -> bool:
        local = self._book.by_handle(handle)
        return local is not None and local.next_node is not None and self._post.congested(local.next_node)

    def _deliver(self, outcome: StepOutcome) -> None:
        for group, items, rows in outcome.rows:
            self._send_rows(NodeId(group), items, rows)
        for said in (*scores(self._book, outcome.scored), *tokens(self._book, self.node, outcome.drawn)):
            self._post.to_coordinator(said)
        for item in outcome.out_of_kv:
            used, room = self.compute.engine.kv_used_token_layers, self.compute.engine.kv_capacity_token_layers
            self._fail_pass(item, "kv_full", f"KV pool full: {used} of {room} token-layers in use")
        for item, why in outcome.failed:
            logs.event(
                log, logging.ERROR, "pass_failed", node=self.node, start=item.start, rows=item.n, reason=why
            )  # fmt: skip
            self._fail_pass(item, "compute", why)

    def _send_rows(self, node: NodeId, items: list[Pass], rows: memoryview) -> None:
        for each in activations(self._book, self.incarnation, node, items, rows, self.compute.row_bytes):
            if not self._post.to_node(node, each.message, each.payload, urgent=each.urgent):
                for item in items:
                    self._fail_pass(item, "link_lost", f"no link to {node}")

    # -- arrivals and endings ----------------------------------------------------------------------------------------

    def _arrive(self, sequence: SequenceId, attempt: Attempt, epoch: Epoch, item: Pass) -> None:
        too_long = self._max_tokens is not None and item.start + item.n > self._max_tokens
        if too_long or self._book.is_over(sequence, attempt):
            self._book.stale_frames += 1
            return
        local = self._book.get(sequence, attempt)
        if local is not None:
            self._accept(local, item)
        elif epoch in self._live_epochs:
            self._book.hold_early(sequence, Early(attempt, item))
        else:
            self._book.stale_frames += 1

    def _accept(self, local: LocalSequence, item: Pass) -> None:
        if (item.token_ids is not None) != (local.layers.start == 0):
            self._book.stale_frames += 1
            return
        for ready in self._book.in_order(local, item):
            self._batcher.add(_with_handle(ready, local.handle))
        self._work.set()

    def _discard(self, local: LocalSequence) -> None:
        self._batcher.drop(local.handle)
        # A step closes before it opens: what the engine has not seen yet must not be opened after its end.
        self._opens = [spec for spec in self._opens if spec.id != local.handle]
        self._closes.append((local.handle, local))
        self._work.set()

    def _end(self, local: LocalSequence) -> None:
        self._book.close(local.sequence, local.attempt)
        self._discard(local)

    def _fail_pass(self, item: Pass, code: str, message: str) -> None:
        local = self._book.by_handle(item.handle)
        if local is not None:
            self._fail_local(local, code, message)

    def _fail_local(self, local: LocalSequence, code: str, message: str) -> None:
        self._end(local)
        self._fail(local.sequence, local.attempt, code, message)

    def _fail(self, sequence: SequenceId, attempt: Attempt, code: str, message: str) -> None:
        self._post.to_coordinator(StageFailed(sequence, attempt, self.node, code, brief(message)))

    def _now(self) -> float:
        return time.monotonic()


def _with_handle(item: Pass, handle: SequenceId) -> Pass:
    return Pass(handle, item.step, item.start, item.n, item.sample, item.arrived_s, item.token_ids, item.rows)
