"""Put load on an OpenAI-compatible endpoint and say how it served: TTFT, TPOT, time between tokens, tokens/s.

    python scripts/bench_serve.py --url http://127.0.0.1:8080 --concurrency 8 --requests 100
    python scripts/bench_serve.py --rate 2 --requests 200 --lengths lengths.csv --json out.json

Prompts are lists of random token ids of the wanted lengths, sent to /v1/completions as streams with `ignore_eos`, so
that each request has exactly its length. With --rate, requests arrive as a Poisson process whether or not earlier ones
have ended; with --concurrency, that many run at any time. A key is taken from $OPENAI_API_KEY. Exit status 1 if any
request failed.
"""

import argparse
import asyncio
import csv
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import aiohttp
from bench_statistics import Outcome, Spread, Summary, summarize
from rich.console import Console
from rich.table import Table

Lengths = tuple[int, int]
"""Input and output tokens of a request."""

DEFAULT_LENGTHS: tuple[Lengths, ...] = ((16, 32), (32, 64), (64, 64), (128, 32), (128, 96), (256, 64))


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked of the endpoint. Exactly one of `rate_per_s` and `concurrency` is set."""

    url: str
    model: str
    requests: int
    lengths: tuple[Lengths, ...]
    rate_per_s: float | None
    concurrency: int | None
    seed: int
    token_ids: tuple[int, int]
    timeout_s: float


def read_lengths(path: Path) -> tuple[Lengths, ...]:
    """Rows `input_tokens,output_tokens` of a CSV file; a first row that is no numbers is a header.

    Raises ValueError naming the line that is wrong.
    """
    rows: list[Lengths] = []
    with path.open(newline="", encoding="utf-8") as file:
        for number, row in enumerate(csv.reader(file), start=1):
            if not row or (number == 1 and not row[0].strip().isdigit()):
                continue
            try:
                lengths = (int(row[0]), int(row[1]))
            except (ValueError, IndexError) as error:
                raise ValueError(f"{path}:{number}: expected input_tokens,output_tokens") from error
            if min(lengths) < 1:
                raise ValueError(f"{path}:{number}: lengths must be at least 1")
            rows.append(lengths)
    if not rows:
        raise ValueError(f"{path}: no lengths in it")
    return tuple(rows)


def within(lengths: Sequence[Lengths], max_context_tokens: int | None) -> tuple[Lengths, ...]:
    """The lengths that fit a context. Raises ValueError if none does."""
    fitting = tuple(pair for pair in lengths if max_context_tokens is None or sum(pair) <= max_context_tokens)
    if not fitting:
        raise ValueError(f"no pair of lengths fits a context of {max_context_tokens} tokens")
    return fitting


class LoadTest:
    """Sends the requests of one load and keeps their outcomes."""

    def __init__(self, session: aiohttp.ClientSession, load: Load) -> None:
        self._session = session
        self._load = load
        self._random = random.Random(load.seed)
        self._began_s = 0.0
        self._outcomes: list[Outcome] = []

    async def run(self) -> list[Outcome]:
        """Send everything and return the outcomes in the order they ended."""
        load = self._load
        bodies = [self._body(*self._random.choice(load.lengths)) for _ in range(load.requests)]
        self._began_s = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            if load.rate_per_s is not None:
                due_s = 0.0
                for number, body in enumerate(bodies):
                    await asyncio.sleep(due_s - self._now_s())
                    group.create_task(self._request(body), name=f"request-{number}")
                    due_s += self._random.expovariate(load.rate_per_s)
            else:
                waiting = iter(bodies)
                for number in range(min(load.concurrency or 1, len(bodies))):
                    group.create_task(self._one_after_another(waiting), name=f"client-{number}")
        return self._outcomes

    async def _one_after_another(self, bodies: Iterator[dict[str, object]]) -> None:
        for body in bodies:
            await self._request(body)

    def _body(self, input_tokens: int, output_tokens: int) -> dict[str, object]:
        return {
            "model": self._load.model,
            "prompt": [self._random.randrange(*self._load.token_ids) for _ in range(input_tokens)],
            "max_tokens": output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }

    async def _request(self, body: dict[str, object]) -> None:
        sent_s = self._now_s()
        stream = _Stream()
        error: str | None = None
        try:
            async with self._session.post(
                f"{self._load.url}/v1/completions",
                json=body,
                timeout=aiohttp.ClientTimeout(total=self._load.timeout_s),
            ) as response:
                if response.status != 200:
                    error = f"HTTP {response.status}: {_error_message(await response.text())}"
                else:
                    async for line in response.content:
                        stream.take(line, self._now_s())
                    error = stream.error()
        except TimeoutError:
            error = f"no end within {self._load.timeout_s:g} s"
        except (aiohttp.ClientError, ValueError) as failure:
            error = f"{type(failure).__name__}: {failure}"
        prompt = body["prompt"]
        assert isinstance(prompt, list)
        self._outcomes.append(
            Outcome(
                input_tokens=len(prompt),
                output_tokens=len(stream.event_times_s) if stream.output_tokens is None else stream.output_tokens,
                sent_s=sent_s,
                ended_s=self._now_s(),
                event_times_s=tuple(stream.event_times_s),
                error=error,
            )
        )

    def _now_s(self) -> float:
        return time.perf_counter() - self._began_s


class _Stream:
    """What a stream of server-sent events has said so far."""

    def __init__(self) -> None:
        self.event_times_s: list[float] = []
        self.output_tokens: int | None = None
        self._failure: str | None = None
        self._done = False

    def take(self, line: bytes, now_s: float) -> None:
        """One line of the stream. Raises ValueError for data that is not JSON."""
        if not line.startswith(b"data:"):
            return
        data = line.removeprefix(b"data:").strip()
        if data == b"[DONE]":
            self._done = True
            return
        chunk = json.loads(data)
        if "error" in chunk:
            self._failure = _error_message(data.decode())
            return
        if chunk.get("usage"):
            self.output_tokens = chunk["usage"]["completion_tokens"]
        # The event that only ends a choice carries no token.
        if any(choice.get("text") or not choice.get("finish_reason") for choice in chunk.get("choices", ())):
            self.event_times_s.append(now_s)

    def error(self) -> str | None:
        """Why the ended stream is no success; None if it is."""
        if self._failure is not None:
            return f"error event: {self._failure}"
        return None if self._done else "stream ended without [DONE]"


def _error_message(text: str) -> str:
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return text[:200]


def show(load: Load, summary: Summary, console: Console) -> None:
    """Print the figures for people."""
    arrivals = f"{load.rate_per_s:g} requests/s" if load.rate_per_s is not None else f"{load.concurrency} at a time"
    table = Table(title=f"{load.model}: {summary.completed} of {summary.requests} requests, {arrivals}")
    for heading in ("", "mean", "p50", "p95", "p99", "max"):
        table.add_column(heading, justify="right" if heading else "left")
    rows: tuple[tuple[str, Spread | None], ...] = (
        ("time to first token (ms)", summary.ttft),
        ("time per output token (ms)", summary.tpot),
        ("between events (ms)", summary.inter_token),
        ("whole request (ms)", summary.e2e),
    )
    for name, spread in rows:
        figures = (spread.mean_ms, spread.p50_ms, spread.p95_ms, spread.p99_ms, spread.max_ms) if spread else ()
        table.add_row(name, *(f"{figure:.1f}" for figure in figures))
    console.print(table)
    console.print(
        f"{summary.duration_s:.1f} s: {summary.requests_per_s:.2f} requests/s, "
        f"{summary.output_tokens_per_s:.1f} output tokens/s, {summary.total_tokens_per_s:.1f} tokens/s in all"
    )
    for message, count in summary.errors.items():
        console.print(f"{count} x {message}", style="red", markup=False)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line. Exits 2 if it is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8080", help="default: %(default)s")
    parser.add_argument("--model", help="default: the first that /v1/models lists")
    arrivals = parser.add_mutually_exclusive_group()
    arrivals.add_argument("--rate", type=_positive(float), metavar="R", help="requests per second, Poisson arrivals")
    arrivals.add_argument("--concurrency", type=_positive(int), metavar="N", help="requests at a time (default: 8)")
    parser.add_argument("--requests", type=_positive(int), default=64, metavar="N", help="default: %(default)s")
    parser.add_argument("--lengths", type=Path, metavar="FILE", help="CSV of input,output tokens; default: a short mix")
    parser.add_argument("--max-context", type=_positive(int), metavar="N", help="leave out lengths that sum to more")
    parser.add_argument(
        "--token-ids", type=_token_ids, default=(100, 1000), metavar="LOW:HIGH", help="of prompts; default: 100:1000"
    )
    parser.add_argument("--seed", type=int, default=0, help="of lengths, prompts and arrivals (default: %(default)s)")
    parser.add_argument("--timeout", type=_positive(float), default=600.0, metavar="S", help="per request, in seconds")
    parser.add_argument("--json", metavar="FILE", help="also write the figures as JSON; - for standard output")
    return parser.parse_args(argv)


def _positive(kind: type[int] | type[float]) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError("must be more than 0")
        return value

    return parse


def _token_ids(text: str) -> tuple[int, int]:
    low, _, high = text.partition(":")
    if not (low.isdigit() and high.isdigit() and int(low) < int(high)):
        raise argparse.ArgumentTypeError("expected LOW:HIGH with LOW less than HIGH")
    return int(low), int(high)


async def _first_model(session: aiohttp.ClientSession, url: str) -> str:
    async with session.get(f"{url}/v1/models", timeout=aiohttp.ClientTimeout(total=10)) as response:
        response.raise_for_status()
        models = (await response.json())["data"]
    if not models:
        raise ValueError(f"{url} serves no model; name one with --model")
    return str(models[0]["id"])


async def measure(arguments: argparse.Namespace) -> tuple[Load, Summary]:
    """Run the load test that the command line describes. Raises ValueError, OSError or aiohttp.ClientError."""
    lengths = within(read_lengths(arguments.lengths) if arguments.lengths else DEFAULT_LENGTHS, arguments.max_context)
    url = arguments.url.rstrip("/").removesuffix("/v1")
    key = os.environ.get("OPENAI_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    async with aiohttp.ClientSession(headers=headers, connector=aiohttp.TCPConnector(limit=0)) as session:
        load = Load(
            url=url,
            model=arguments.model or await _first_model(session, url),
            requests=arguments.requests,
            lengths=lengths,
            rate_per_s=arguments.rate,
            concurrency=None if arguments.rate else (arguments.concurrency or 8),
            seed=arguments.seed,
            token_ids=arguments.token_ids,
            timeout_s=arguments.timeout,
        )
        return load, summarize(await LoadTest(session, load).run())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    arguments = parse_arguments(argv)
    try:
        load, summary = asyncio.run(measure(arguments))
    except (ValueError, OSError, aiohttp.ClientError) as error:
        print(f"bench_serve: {error}", file=sys.stderr)
        return 1
    show(load, summary, Console(stderr=arguments.json == "-"))
    if arguments.json:
        settings = {name: value for name, value in asdict(load).items() if name != "lengths"}
        document = {"load": settings | {"lengths": str(arguments.lengths or "built-in")}, **summary.to_dict()}
        text = json.dumps(document, indent=2)
        if arguments.json == "-":
            print(text)
        else:
            Path(arguments.json).write_text(text + "\n", encoding="utf-8")
    return 1 if summary.errors else 0


if __name__ == "__main__":
    sys.exit(main())
