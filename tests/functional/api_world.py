"""A fake coordinator and a byte tokenizer behind a real API on a real socket, for the API's functional tests."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from helixd.api.options import ApiOptions
from helixd.api.server import Bound, create_app, serve
from helixd.api.state import STATE, ApiState
from helixd.api.text import TextTools
from helixd.coordinator.generation import (
    Delta,
    Event,
    Finished,
    Generation,
    GenerationRequest,
    PromptScored,
    Readiness,
    Refused,
    TokenText,
)
from helixd.sampling import TokenLogprobs

MODEL = "org/tiny-model"
CONTEXT_TOKENS = 512


class ByteTokenizer:
    """One token per byte."""

    vocab_size = 256
    special_ids: frozenset[int] = frozenset()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return bytes(ids).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id])


class LineTemplate:
    """`role: content` per message; refuses the speaker "nobody" as a model's own template might."""

    def __init__(self) -> None:
        self.seen: list[tuple[list[dict[str, Any]], dict[str, Any]]] = []

    def render(self, messages: list[dict[str, Any]], add_generation_prompt: bool = True, **scalars: Any) -> str:
        self.seen.append((messages, scalars))
        if any(message.get("name") == "nobody" for message in messages):
            raise ValueError("speakers named nobody are not known")
        lines = [f"{message['role']}: {message['content']}\n" for message in messages]
        return "".join(lines) + ("assistant:" if add_generation_prompt else "")


Script = Callable[[GenerationRequest], AsyncIterator[Event]]


def scores(token: int, alternatives: int | None) -> TokenLogprobs | None:
    """Made-up log probabilities: the token itself first, then its followers."""
    if alternatives is None:
        return None
    return TokenLogprobs(-0.25, tuple(((token + i) % 256, -0.25 - i) for i in range(alternatives)))


def say(text: str, *, reason: str = "stop") -> Script:
    """Each choice says `text`, one byte token at a time, as a real generation would: whole characters only."""

    async def script(request: GenerationRequest) -> AsyncIterator[Event]:
        logprobs = request.sampling.logprobs
        if request.prompt_logprobs:
            _first, *rest = request.prompt
            yield PromptScored((None, *(scores(token, logprobs) for token in rest)))
        for character in text:
            raw = character.encode()
            for choice in range(request.n):
                for byte in raw[:-1]:
                    yield Delta(choice, "", (TokenText(byte, scores(byte, logprobs)),))
                yield Delta(choice, character, (TokenText(raw[-1], scores(raw[-1], logprobs)),))
            await asyncio.sleep(0)
        for choice in range(request.n):
            yield Finished(choice, reason, len(text.encode()))  # type: ignore[arg-type]

    return script


@dataclass
class FakeGeneration:
    request: GenerationRequest
    script: Script
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    slow_cancel_s: float = 0.0
    route: tuple[str, ...] = ("a[0,4)", "b[4,8)")
    retries: int = 0

    def events(self) -> AsyncIterator[Event]:
        return self.script(self.request)

    async def cancel(self) -> None:
        await asyncio.sleep(self.slow_cancel_s)
        self.cancelled.set()


@dataclass
class FakeService:
    script: Script = field(default_factory=lambda: say("Hello"))
    refusal: Refused | None = None
    hold: asyncio.Event | None = None
    ready: bool = True
    model_name: str = MODEL
    max_context_tokens: int = CONTEXT_TOKENS
    slow_cancel_s: float = 0.0
    retries: int = 0
    requests: list[GenerationRequest] = field(default_factory=list)
    generations: list[FakeGeneration] = field(default_factory=list)
    submit_cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    before_admission: Callable[[GenerationRequest], Awaitable[None]] | None = None

    def readiness(self) -> Readiness:
        if self.ready:
            return Readiness(True, None, "ready", {"nodes": 2})
        return Readiness(False, "no_feasible_placement", "needs 38.2 GiB, the cluster offers 24.0", {"nodes": 1})

    async def submit(self, request: GenerationRequest) -> Generation:
        self.requests.append(request)
        try:
            if self.hold is not None:
                await self.hold.wait()
            if self.before_admission is not None:
                await self.before_admission(request)
        except asyncio.CancelledError:
            self.submit_cancelled.set()
            raise
        if self.refusal is not None:
            raise self.refusal
        generation = FakeGeneration(request, self.script, slow_cancel_s=self.slow_cancel_s, retries=self.retries)
        self.generations.append(generation)
        return generation

    def cluster_view(self) -> Mapping[str, object]:
        return {"epoch": 3, "nodes": [{"id": "a", "layers": [0, 4]}]}


@dataclass
class World:
    service: FakeService
    template: LineTemplate
    bound: Bound
    state: ApiState

    @property
    def url(self) -> str:
        return self.bound.url


async def until(condition: Callable[[], object]) -> None:
    """Wait for what another task does; fails after a while."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.002)


@asynccontextmanager
async def api_world(service: FakeService | None = None, options: ApiOptions | None = None) -> AsyncIterator[World]:
    """A listening API in front of the fake coordinator."""
    service = service or FakeService()
    template = LineTemplate()
    app = create_app(service, TextTools(ByteTokenizer(), template), options or ApiOptions())
    async with serve(app, "127.0.0.1", 0) as bound:
        yield World(service, template, bound, app[STATE])
