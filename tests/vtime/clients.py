"""Clients of a virtual cluster: each asks once, reads at its own speed, may leave, and checks every event it gets."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

from helixd.coordinator.generation import (
    Delta,
    Event,
    Failed,
    Finished,
    Generation,
    GenerationRequest,
    PromptScored,
    Refused,
)
from helixd.ids import RequestId
from helixd.sampling import SamplingParams, TokenLogprobs
from tests.vtime.model import reference

if TYPE_CHECKING:
    from tests.vtime.world import World


@dataclass(frozen=True, slots=True)
class Expected:
    """What a choice must answer."""

    tokens: list[int]
    scores: list[TokenLogprobs | None]
    logprobs: list[TokenLogprobs]


@dataclass(slots=True)
class Client:
    """One request and what came of it. `outcome`: None while it runs, else how it ended."""

    request: GenerationRequest
    read_delay_s: float
    asked_s: float
    faults_before: int
    last_fault_s: float
    expected: list[Expected]
    outcome: str | None = None
    failure: Failed | None = None
    refusal: Refused | None = None
    ended_s: float = 0.0
    faults_after: int = 0
    generation: Generation | None = None
    task: asyncio.Task[None] | None = None
    tokens: list[list[int]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    finished: list[bool] = field(default_factory=list)
    arrived_s: list[float] = field(default_factory=list)
    scored: bool = False

    @property
    def longest_gap_s(self) -> float:
        """The longest that the client saw nothing, from its first text to its last."""
        return max((after - before for before, after in pairwise(self.arrived_s)), default=0.0)


class Clients:
    """Everybody who ever asked."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.all: list[Client] = []

    @property
    def running(self) -> list[Client]:
        return [client for client in self.all if client.outcome is None]

    def ask(
        self, prompt: tuple[int, ...], max_tokens: int, *, n: int = 1, seed: int = 0, logprobs: int | None = None,
        score: bool = False, deadline_s: float | None = None, read_delay_s: float = 0.0, stop_at: int | None = None,
    ) -> Client:  # fmt: skip
        """Ask. `stop_at`: the token of that number in the first choice's answer is a stop token."""
        from tests.vtime.world import NUM_LAYERS

        sampling = SamplingParams(seed=seed, logprobs=logprobs)
        answers = [
            Expected(*reference(NUM_LAYERS, prompt, max_tokens, SamplingParams(seed=seed, choice=c, logprobs=logprobs)))
            for c in range(n)
        ]
        stops: tuple[int, ...] = ()
        if stop_at is not None and stop_at < max_tokens:
            stops = (answers[0].tokens[stop_at],)
            for answer in answers:
                if stops[0] in answer.tokens:
                    del answer.tokens[answer.tokens.index(stops[0]) + 1 :]
        request = GenerationRequest(
            RequestId(f"r{len(self.all)}"), prompt, n, max_tokens, sampling, stop_token_ids=stops,
            prompt_logprobs=score, deadline_s=deadline_s,
        )  # fmt: skip
        world = self._world
        client = Client(
            request, read_delay_s, world.loop.time(), world.faults.count, world.faults.last_s, answers,
            tokens=[[] for _ in range(n)], texts=[""] * n, finished=[False] * n,
        )  # fmt: skip
        self.all.append(client)
        world.note(
            f"ask {request.request_id}: {len(prompt)} + {max_tokens} tokens, n={n}, {deadline_s=}, {read_delay_s=}"
        )
        client.task = world.hub.process.spawn(self._live(client), f"client {request.request_id}")
        return client

    def leave(self, client: Client) -> None:
        """Close the connection, as the API does it: whatever it awaits is cancelled, then the generation."""
        assert client.task is not None
        self._world.note(f"{client.request.request_id} leaves")
        client.task.cancel()

    def coordinator_died(self) -> None:
        """Its sockets went with it."""
        for client in self.running:
            self._end(client, "lost with the coordinator")

    async def _live(self, client: Client) -> None:
        coordinator = self._world.coordinator
        try:
            client.generation = await coordinator.submit(client.request)
            async for event in client.generation.events():
                self._take(client, event)
                if client.read_delay_s:
                    await asyncio.sleep(client.read_delay_s)
            self._check_end(client)
        except Refused as refusal:
            client.refusal = refusal
            self._end(client, "refused")
        except asyncio.CancelledError:
            if client.outcome is None:
                self._end(client, "left")
            if client.generation is not None:
                await client.generation.cancel()
            raise

    def _end(self, client: Client, outcome: str) -> None:
        if client.outcome is not None:
            self._world.complain(f"{client.request.request_id} ends twice: {client.outcome}, then {outcome}")
        client.outcome = outcome
        client.ended_s = self._world.loop.time()
        client.faults_after = self._world.faults.count

    def _take(self, client: Client, event: Event) -> None:
        who = client.request.request_id
        if client.outcome is not None:
            self._world.complain(f"{who} is over ({client.outcome}) and gets {event}")
            return
        match event:
            case Delta(choice, text, tokens):
                client.arrived_s.append(self._world.loop.time())
                if client.finished[choice]:
                    self._world.complain(f"{who}: more text for choice {choice} after its end")
                if client.request.prompt_logprobs and not client.scored:
                    self._world.complain(f"{who}: text before the prompt's scores")
                want = client.expected[choice]
                if client.request.sampling.logprobs is not None:
                    at = len(client.tokens[choice])
                    if [token.logprobs for token in tokens] != want.logprobs[at : at + len(tokens)]:
                        self._world.complain(f"{who}: choice {choice} has other log probabilities at {at}")
                client.tokens[choice].extend(token.id for token in tokens)
                client.texts[choice] += text
                have = client.tokens[choice]
                if have != want.tokens[: len(have)]:
                    self._world.complain(f"{who}: choice {choice} is {have}, must begin {want.tokens}")
            case Finished(choice, _, completion_tokens):
                if client.finished[choice]:
                    self._world.complain(f"{who}: choice {choice} finished twice")
                client.finished[choice] = True
                have, want = client.tokens[choice], client.expected[choice]
                text = "".join(f"<{token}>" for token in want.tokens)
                if want.tokens and want.tokens[-1] in client.request.stop_token_ids:
                    text = text[: text.rindex("<")]
                if client.texts[choice] != text:
                    self._world.complain(f"{who}: the text of choice {choice} is {client.texts[choice]}, not {text}")
                if have != want.tokens or completion_tokens != len(want.tokens):
                    self._world.complain(
                        f"{who}: choice {choice} ended as {have} ({completion_tokens}), not {want.tokens}"
                    )
            case PromptScored(scores):
                if client.scored or list(scores) != client.expected[0].scores:
                    self._world.complain(f"{who}: the prompt's scores are wrong or come twice")
                client.scored = True
            case Failed():
                client.failure = event
                self._end(client, f"failed: {event.code}")

    def _check_end(self, client: Client) -> None:
        if client.failure is not None:
            return
        if not all(client.finished):
            self._world.complain(f"{client.request.request_id}: the events end without an end: {client.finished}")
        self._end(client, "finished")
