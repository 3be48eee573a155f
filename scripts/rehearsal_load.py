"""The load of a rehearsal: the simulator's requests through the HTTP API, timed on this side of it.

All figures are in the cluster's own seconds: what passes here, divided by the time scale. A request of (in, out)
tokens asks for out + 1: the first comes with the prompt, and each of the others is a decode pass.
"""

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import aiohttp
import msgspec

from helixd.sim.job import Request
from helixd.sim.load import Lengths, Load, Offline


class _Choice(msgspec.Struct):
    text: str


class _Failure(msgspec.Struct):
    message: str


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    error: _Failure | None = None


_DECODER = msgspec.json.Decoder(_Chunk)


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """What is sent: `load` as the simulator has it, an Offline one with so many clients `in_flight`."""

    url: str
    model: str
    lengths: Lengths
    load: Load
    time_scale: float
    seed: int


@dataclass(slots=True)
class Measured:
    """What was seen inside the window, in the cluster's seconds."""

    window_s: float
    decode_tokens: int = 0
    prompt_tokens: int = 0
    ttft_s: list[float] = field(default_factory=list)
    tpot_s: list[float] = field(default_factory=list)
    finished: int = 0
    errors: list[str] = field(default_factory=list)

    @property
    def decode_tokens_per_s(self) -> float:
        """Decode passes that ended inside the window, per second."""
        return self.decode_tokens / self.window_s


class RehearsalLoad:
    """Sends the load and measures it."""

    def __init__(self, session: aiohttp.ClientSession, plan: LoadPlan) -> None:
        self._session = session
        self._plan = plan
        self._requests = plan.lengths.draws(plan.seed)
        self._began_s = 0.0
        self._from_s = plan.load.warmup_s
        self._until_s = plan.load.warmup_s + plan.load.measure_s
        self.measured = Measured(plan.load.measure_s)

    async def run(self) -> Measured:
        """Warm up, measure, stop."""
        plan, load = self._plan, self._plan.load
        self._began_s = time.monotonic()
        try:
            async with asyncio.timeout(self._until_s * plan.time_scale), asyncio.TaskGroup() as tasks:
                if isinstance(load, Offline):
                    assert load.in_flight is not None
                    for number in range(load.in_flight):
                        tasks.create_task(self._for_ever(), name=f"client {number}")
                else:
                    await self._arrivals(tasks, load.arrivals(plan.lengths, plan.seed))
        except TimeoutError:
            pass  # the window is over
        return self.measured

    async def _arrivals(self, tasks: asyncio.TaskGroup, arrivals: Iterator[tuple[float, Request]]) -> None:
        for number, (at_s, request) in enumerate(arrivals):
            await asyncio.sleep((at_s - self._now_s()) * self._plan.time_scale)
            tasks.create_task(self._send(request), name=f"request {number}")

    async def _for_ever(self) -> None:
        while True:
            await self._send(next(self._requests))

    async def _send(self, request: Request) -> None:
        body = {
            "model": self._plan.model, "prompt": [65] * request.input_tokens,
            "max_tokens": request.output_tokens + 1, "stream": True, "temperature": 0, "ignore_eos": True,
        }  # fmt: skip
        sent_s = self._now_s()
        last_s = None
        try:
            async with self._session.post(f"{self._plan.url}/v1/completions", json=body) as response:
                if response.status != 200:
                    self._failed(f"HTTP {response.status}: {(await response.text())[:200]}")
                    return
                async for line in response.content:
                    if not line.startswith(b"data: {"):
                        continue
                    chunk = _DECODER.decode(line[6:])
                    if chunk.error is not None:
                        self._failed(chunk.error.message[:200])
                        return
                    for choice in chunk.choices:
                        for _ in choice.text:
                            last_s = self._token(sent_s, last_s, request.input_tokens)
        except aiohttp.ClientError as error:
            self._failed(f"{type(error).__name__}: {error}")
            return
        if self._inside(self._now_s()):
            self.measured.finished += 1

    def _failed(self, why: str) -> None:
        self.measured.errors.append(why)

    def _token(self, sent_s: float, last_s: float | None, prompt_tokens: int) -> float:
        now_s = self._now_s()
        if self._inside(now_s):
            if last_s is None:
                self.measured.ttft_s.append(now_s - sent_s)
                self.measured.prompt_tokens += prompt_tokens
            else:
                self.measured.tpot_s.append(now_s - last_s)
                self.measured.decode_tokens += 1
        return now_s

    def _inside(self, now_s: float) -> bool:
        return self._from_s <= now_s < self._until_s

    def _now_s(self) -> float:
        """Since the start, in the cluster's seconds."""
        return (time.monotonic() - self._began_s) / self._plan.time_scale
