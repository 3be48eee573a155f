"""One choice of a request from its prompt to its end: the one recovery path lives here.

Owns the truth: prompt ids, emitted ids, attempt, what was scored. An attempt opens a route, feeds prompt + emitted ids,
then one token at a time. Whatever breaks an attempt (a dead worker, a lost link, a full KV pool, a drain, a re-plan, a
step that takes too long) ends the same way: release the route, draw another, feed prompt + emitted ids again. A token
is accepted once: by attempt and step.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Protocol

from helixd.coordinator.generation import Event, Finished, GenerationRequest, PromptScored
from helixd.coordinator.text import ChoiceText
from helixd.errors import HelixError
from helixd.ids import Attempt, Epoch, NodeId, SequenceId
from helixd.protocol.codec import pack_ids
from helixd.protocol.messages import Feed, Message, Open
from helixd.route.router import Route
from helixd.sampling import TokenLogprobs

INBOX_LIMIT = 4096
ROWS_PER_STEP_DEADLINE = 512
PREEMPTIONS = frozenset({"preempted", "kv_full", "draining", "moved"})
LINK_CUT = "link_cut"
"""A link of the route was reported lost, and no route leads over it from now on."""


@dataclass(frozen=True, slots=True)
class Lease:
    """A route that is reserved for one attempt of a sequence, in one epoch's plan.

    `ahead_tokens`: of other prompts, which were being computed when it was drawn; they come first.
    """

    sequence: SequenceId
    attempt: Attempt
    epoch: Epoch
    route: Route
    ahead_tokens: int = 0


@dataclass(frozen=True, slots=True)
class TokenArrived:
    """The last hop drew token number `step`."""

    attempt: Attempt
    step: int
    token: int
    logprobs: TokenLogprobs | None


@dataclass(frozen=True, slots=True)
class ScoresArrived:
    """Log probabilities of the prompt's tokens from `start` on."""

    attempt: Attempt
    start: int
    scores: tuple[TokenLogprobs, ...]


@dataclass(frozen=True, slots=True)
class Broken:
    """The attempt cannot go on. `code` as in `StageFailed`, or peer_lost, preempted, draining, moved, timeout.

    `kv_full` is said of a sequence that has the node's KV cache to itself, `preempted` of one that makes room.
    """

    attempt: Attempt
    code: str
    reason: str


Arrival = TokenArrived | ScoresArrived | Broken


class PipelineLost(HelixError):
    """A sequence broke too often, or nothing is left to run it on. The message is fit for the client."""


class AttemptBroken(HelixError):
    """One attempt ended early; the next may do better."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code = code


class Hub(Protocol):
    """What a sequence needs of the coordinator."""

    async def acquire(self, run: "SequenceRun") -> Lease:
        """A reserved route, waiting in line if need be. Raises NoRoute when there will be none, QueueFull.

        `run.begin(lease)` is called at the moment of the grant: the route may break before the waiter gets to run.
        """
        ...

    def send(self, node: NodeId, message: Message, payload: memoryview | None = None) -> None:
        """Post a message to a node's peer; dropped if it is gone (its sequences hear of that)."""
        ...

    def release(self, lease: Lease) -> None:
        """Close the attempt on every hop; its KV returns to the ledger as the hops confirm."""
        ...

    def progressed(self, lease: Lease, tokens: int) -> None:
        """The sequence is now `tokens` long: the ledger and the router count it."""
        ...

    def step_took_too_long(self, lease: Lease, waited_s: float) -> None:
        """No token came for so long; the route is given up, and which of its nodes hangs is found out."""
        ...


@dataclass(frozen=True, slots=True)
class SequenceLimits:
    """`step_s`: how long a step may take (per 512 rows of a prefill). `max_migrations`: routes lost before an error."""

    step_s: float
    max_migrations: int


class SequenceRun:
    """One choice. `run` to its end; `deliver` what the workers say."""

    def __init__(
        self, sequence: SequenceId, request: GenerationRequest, choice: int, text: ChoiceText, max_tokens: int,
        hub: Hub, limits: SequenceLimits, emit: Callable[[Event], Awaitable[None]],
    ) -> None:  # fmt: skip
        self.id = sequence
        self.request_id = request.request_id
        self.prompt = request.prompt
        self.text = text
        self.lease: Lease | None = None
        self.attempts = 0
        self.migrations = 0
        self.last_break = ""
        self.considered = asyncio.Event()
        self.turned_away = False
        self.routed = asyncio.Event()
        self.order = 0
        self.max_tokens = max_tokens
        self._choice = choice
        self._sampling = replace(request.sampling, choice=choice)
        self._hub = hub
        self._limits = limits
        self._emit = emit
        self._inbox: asyncio.Queue[Arrival] = asyncio.Queue(INBOX_LIMIT)
        self._scores: list[TokenLogprobs | None] | None = None
        if request.prompt_logprobs and choice == 0:
            self._scores = [None] * len(request.prompt)
        self._scores_missing = len(request.prompt) - 1 if self._scores is not None else 0

    @property
    def tokens(self) -> int:
        """Prompt and emitted tokens so far."""
        return len(self.prompt) + len(self.text.ids)

    @property
    def recovering(self) -> bool:
        """Whether it has had a route before: such a sequence is never refused, only delayed."""
        return self.attempts > 0

    def begin(self, lease: Lease) -> None:
        """A route is granted; it is this sequence's to give back from now on."""
        self.lease = lease
        self.attempts += 1
        self.routed.set()

    def deliver(self, arrival: Arrival) -> None:
        """Something arrived for this sequence; what belongs to an older attempt is dropped."""
        if self.lease is None or arrival.attempt != self.lease.attempt:
            return
        if self._inbox.full():
            # Only a worker that talks nonsense fills this; its attempt is given up, nothing else suffers.
            self._inbox.get_nowait()
            arrival = Broken(self.lease.attempt, "overflow", "more arrived for this sequence than it can take")
        self._inbox.put_nowait(arrival)
        if isinstance(arrival, Broken):
            # A client that reads slowly may keep `run` waiting; what the route holds must not wait for it.
            self._give_back()

    async def run(self) -> None:
        """Generate until the choice is finished. Raises PipelineLost, NoRoute or QueueFull."""
        if self._scores is not None and not self._scores_missing:
            await self._emit(PromptScored(tuple(self._scores)))
        cut = False
        while self._unfinished:
            before = self.tokens
            try:
                await self._attempt(await self._hub.acquire(self))
            except AttemptBroken as broken:
                self.last_break = f"{broken.code}: {broken}"
                # Alone with a KV cache that is full before a token is drawn: one that never fits must not be tried for
                # ever. Who only makes room for others waits its turn, however often.
                stuck = self.tokens == before
                # One cut takes many links, found out one by one: until a token has come it counts once.
                counted = not (broken.code == LINK_CUT and stuck and cut)
                cut = broken.code == LINK_CUT
                if counted and (broken.code not in PREEMPTIONS or (broken.code == "kv_full" and stuck)):
                    self.migrations += 1
                if self.migrations > self._limits.max_migrations:
                    raise PipelineLost(
                        f"the pipeline broke {self.migrations} times, the last time with {broken.code}; giving up"
                    ) from broken
            finally:
                self._give_back()
                while not self._inbox.empty():
                    self._inbox.get_nowait()
        await self._emit(Finished(self._choice, self.text.finished or "length", len(self.text.ids)))

    @property
    def _unfinished(self) -> bool:
        return self.text.finished is None and (self.max_tokens > 0 or self._scores_missing > 0)

    def _give_back(self) -> None:
        lease, self.lease = self.lease, None
        if lease is not None:
            self._hub.release(lease)

    async def _attempt(self, lease: Lease) -> None:
        ids = (*self.prompt, *self.text.ids)
        self._open(lease, ids)
        self._feed(lease, 0, ids)
        rows = lease.ahead_tokens + len(ids)
        while self._unfinished:
            match await self._next(lease, rows):
                case Broken(code=code, reason=reason):
                    raise AttemptBroken(code, reason)
                case ScoresArrived(start=start, scores=scores):
                    await self._scored(start, scores)
                case TokenArrived(step=step, token=token, logprobs=logprobs) if step == self.tokens:
                    delta = self.text.accept(token, logprobs)
                    if self.text.finished is None:
                        self._feed(lease, self.tokens - 1, (token,))
                        rows = 1
                    self._hub.progressed(lease, self.tokens)
                    if delta is not None:
                        await self._emit(delta)
                case _:
                    pass

    def _open(self, lease: Lease, ids: tuple[int, ...]) -> None:
        hops = lease.route.hops
        packed = pack_ids(ids)
        for at, hop in enumerate(hops):
            last = at == len(hops) - 1
            message = Open(
                lease.epoch, self.id, lease.attempt, hop.node, hop.layers.start, hop.layers.end,
                "" if last else hops[at + 1].node, len(self.prompt), self._sampling if last else None,
                last and self._scores_missing > 0,
            )  # fmt: skip
            self._hub.send(hop.node, message, packed if last else None)

    def _feed(self, lease: Lease, start: int, ids: tuple[int, ...]) -> None:
        first = lease.route.hops[0].node
        step = start + len(ids)
        message = Feed(lease.epoch, self.id, lease.attempt, first, step, start, self.max_tokens > 0)
        self._hub.send(first, message, pack_ids(ids))

    async def _next(self, lease: Lease, rows: int) -> Arrival:
        patience_s = self._limits.step_s * max(1.0, rows / ROWS_PER_STEP_DEADLINE)
        try:
            async with asyncio.timeout(patience_s):
                return await self._inbox.get()
        except TimeoutError:
            self._hub.step_took_too_long(lease, patience_s)
            hops = " -> ".join(str(hop.node) for hop in lease.route.hops)
            raise AttemptBroken("timeout", f"no token within {patience_s:g} s from {hops}") from None

    async def _scored(self, start: int, scores: tuple[TokenLogprobs, ...]) -> None:
        if self._scores is None or not self._scores_missing:
            return
        for at, score in enumerate(scores, start):
            if 0 < at < len(self._scores) and self._scores[at] is None:
                self._scores[at] = score
                self._scores_missing -= 1
        if not self._scores_missing:
            await self._emit(PromptScored(tuple(self._scores)))
