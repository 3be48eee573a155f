"""The load of a rehearsal: requests of a trace's lengths through the HTTP API, timed on this side of it.

All figures are in the cluster's own seconds: what passes here, divided by the time scale. A request of (in, out)
tokens asks for out + 1: the first comes with the prompt, and each of the others is a decode pass.
"""

import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import aiohttp

Lengths = tuple[int, int]


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """What is sent. `in_flight`: so many open requests at any time; else `rate_per_s` arrivals (Poisson)."""

    url: str
    model: str
    lengths: Sequence[Lengths]
    warm_up_s: float
    window_s: float
    time_scale: float
    seed: int
    in_flight: int | None
    rate_per_s: float | None


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
        self._random = random.Random(plan.seed)
        self._began_s = 0.0
        self.measured = Measured(plan.window_s)

    async def run(self) -> Measured:
        """Warm up, measure, stop."""
        plan = self._plan
        self._began_s = time.monotonic()
        total_s = (plan.warm_up_s + plan.window_s) * plan.time_scale
        try:
            async with asyncio.timeout(total_s), asyncio.TaskGroup() as tasks:
                if plan.in_flight is not None:
                    for number in range(plan.in_flight):
                        tasks.create_task(self._for_ever(number), name=f"client {number}")
                else:
                    assert plan.rate_per_s is not None
                    await self._arrivals(tasks, plan.rate_per_s)
        except TimeoutError:
            pass  # the window is over
        return self.measured

    async def _arrivals(self, tasks: asyncio.TaskGroup, rate_per_s: float) -> None:
        number = 0
        while True:
            await asyncio.sleep(self._random.expovariate(rate_per_s) * self._plan.time_scale)
            tasks.create_task(self._request(), name=f"request {number}")
            number += 1

    async def _for_ever(self, number: int) -> None:
        # Not all at once: the first prompts would arrive as one lump that the window still remembers.
        await asyncio.sleep(0.1 * number * self._plan.time_scale)
        while True:
            await self._request()

    async def _request(self) -> None:
        plan = self._plan
        prompt_tokens, output_tokens = self._random.choice(plan.lengths)
        body = {
            "model": plan.model, "prompt": [65] * prompt_tokens, "max_tokens": output_tokens + 1, "stream": True,
            "temperature": 0, "ignore_eos": True, "stream_options": {"include_usage": False},
        }  # fmt: skip
        sent_s = self._now_s()
        last_s = None
        try:
            async with self._session.post(f"{plan.url}/v1/completions", json=body) as response:
                if response.status != 200:
                    self.measured.errors.append(f"HTTP {response.status}: {(await response.text())[:200]}")
                    return
                async for line in response.content:
                    if not line.startswith(b"data: {"):
                        continue
                    chunk = json.loads(line[6:])
                    if "error" in chunk:
                        self.measured.errors.append(str(chunk["error"]["message"])[:200])
                        return
                    for _ in chunk["choices"][0]["text"]:
                        last_s = self._token(sent_s, last_s, prompt_tokens)
        except aiohttp.ClientError as error:
            self.measured.errors.append(f"{type(error).__name__}: {error}")
            return
        if self._inside(self._now_s()):
            self.measured.finished += 1

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
        return self._plan.warm_up_s <= now_s < self._plan.warm_up_s + self._plan.window_s

    def _now_s(self) -> float:
        """Since the start, in the cluster's seconds."""
        return (time.monotonic() - self._began_s) / self._plan.time_scale
