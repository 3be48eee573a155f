"""The load client against a small endpoint of our own that streams, refuses, breaks off and hangs."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

sys.path.append(str(Path(__file__).parents[2] / "scripts"))

import bench_serve


class Endpoint:
    """Streams as many tokens as asked, or misbehaves as `mood` says. Keeps the bodies and the most at once."""

    def __init__(self) -> None:
        self.mood = "fine"
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.running = 0
        self.most_at_once = 0

    async def models(self, _request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "tiny", "object": "model"}]})

    async def completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        self.keys.add(request.headers.get("Authorization"))
        if self.mood == "refuse":
            return web.json_response({"error": {"message": "queue is full"}}, status=429)
        self.running += 1
        self.most_at_once = max(self.most_at_once, self.running)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b": keep-alive\n\n")
        for _ in range(body["max_tokens"]):
            await self._send(response, {"choices": [{"index": 0, "text": "x", "finish_reason": None}], "usage": None})
            await asyncio.sleep(0)
        if self.mood == "error":
            await self._send(response, {"error": {"message": "pipeline lost"}})
        elif self.mood == "hang":
            await asyncio.sleep(30)
        elif self.mood == "garbage":
            await response.write(b"data: {nonsense\n\n")
        elif self.mood == "fine":
            await self._send(
                response, {"choices": [{"index": 0, "text": "", "finish_reason": "length"}], "usage": None}
            )
            await self._send(response, {"choices": [], "usage": {"completion_tokens": body["max_tokens"]}})
            await response.write(b"data: [DONE]\n\n")
        self.running -= 1
        return response

    async def _send(self, response: web.StreamResponse, chunk: dict[str, Any]) -> None:
        await response.write(f"data: {json.dumps(chunk)}\n\n".encode())


@pytest.fixture
async def endpoint() -> AsyncIterator[tuple[Endpoint, str]]:
    behaviour = Endpoint()
    app = web.Application()
    app.router.add_get("/v1/models", behaviour.models)
    app.router.add_post("/v1/completions", behaviour.completions)
    async with TestServer(app, port=0) as server:
        yield behaviour, str(server.make_url("")).rstrip("/")


async def run(url: str, *arguments: str) -> bench_serve.Summary:
    _, summary = await bench_serve.measure(bench_serve.parse_arguments(["--url", url, *arguments]))
    return summary


async def test_a_closed_loop_keeps_its_concurrency(
    endpoint: tuple[Endpoint, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    behaviour, url = endpoint
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    lengths = tmp_path / "lengths.csv"
    lengths.write_text("input_tokens,output_tokens\n7,3\n2,5\n4000,4000\n")
    summary = await run(
        f"{url}/v1", "--concurrency", "2", "--requests", "12", "--lengths", str(lengths), "--max-context", "20",
        "--token-ids", "5:9",
    )  # fmt: skip
    assert (summary.requests, summary.completed, summary.errors) == (12, 12, {})
    assert behaviour.most_at_once == 2
    asked = {(len(body["prompt"]), body["max_tokens"]) for body in behaviour.bodies}
    assert asked == {(7, 3), (2, 5)}
    assert summary.input_tokens == sum(len(body["prompt"]) for body in behaviour.bodies)
    assert summary.output_tokens == sum(body["max_tokens"] for body in behaviour.bodies)
    body = behaviour.bodies[0]
    assert (body["model"], body["stream"], body["ignore_eos"]) == ("tiny", True, True)
    assert all(5 <= token < 9 for token in body["prompt"])
    assert behaviour.keys == {"Bearer k"}
    assert summary.ttft is not None
    assert summary.ttft.count == 12
    assert summary.inter_token is not None
    assert summary.inter_token.count == summary.output_tokens - 12


async def test_poisson_arrivals_do_not_wait_for_one_another(endpoint: tuple[Endpoint, str]) -> None:
    behaviour, url = endpoint
    behaviour.mood = "hang"
    summary = await run(url, "--rate", "1000", "--requests", "10", "--timeout", "1.5", "--model", "m")
    assert behaviour.most_at_once == 10
    assert summary.errors == {"no end within 1.5 s": 10}


async def test_the_same_seed_asks_the_same(endpoint: tuple[Endpoint, str]) -> None:
    behaviour, url = endpoint
    for seed in ("1", "1", "2"):
        await run(url, "--concurrency", "1", "--requests", "4", "--seed", seed)
    first, second, third = (behaviour.bodies[start : start + 4] for start in (0, 4, 8))
    assert first == second
    assert first != third


@pytest.mark.parametrize(
    ("mood", "error"),
    [("refuse", "HTTP 429: queue is full"), ("error", "error event: pipeline lost"),
     ("cut", "stream ended without [DONE]"), ("garbage", "JSONDecodeError")],
)  # fmt: skip
async def test_failures_are_counted_by_reason(mood: str, error: str, endpoint: tuple[Endpoint, str]) -> None:
    behaviour, url = endpoint
    behaviour.mood = mood
    summary = await run(url, "--requests", "3")
    assert summary.completed == 0
    ((reason, count),) = summary.errors.items()
    assert count == 3
    assert reason.startswith(error)


async def test_figures_as_a_table_and_as_json(
    endpoint: tuple[Endpoint, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, url = endpoint
    file = tmp_path / "out.json"
    assert await asyncio.to_thread(bench_serve.main, ["--url", url, "--requests", "3", "--json", str(file)]) == 0
    assert "time to first token" in capsys.readouterr().out
    assert json.loads(file.read_text())["completed"] == 3
    assert await asyncio.to_thread(bench_serve.main, ["--url", url, "--requests", "3", "--json", "-"]) == 0
    printed = capsys.readouterr()
    document = json.loads(printed.out)
    assert (document["load"]["concurrency"], document["load"]["lengths"]) == (8, "built-in")
    assert document["ttft"]["count"] == 3
    assert "time to first token" in printed.err


async def test_failures_end_with_status_1(endpoint: tuple[Endpoint, str], capsys: pytest.CaptureFixture[str]) -> None:
    behaviour, url = endpoint
    behaviour.mood = "refuse"
    assert await asyncio.to_thread(bench_serve.main, ["--url", url, "--requests", "2"]) == 1
    assert "2 x HTTP 429: queue is full" in capsys.readouterr().out
    assert await asyncio.to_thread(bench_serve.main, ["--url", url, "--lengths", "/no/such/file"]) == 1
    assert "bench_serve: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "line"), [("1\n", 1), ("a,b\n1,2\nx,3\n", 3), ("1,0\n", 1), ("input,output\n", None), ("", None)]
)
def test_lengths_that_cannot_be_read(text: str, line: int | None, tmp_path: Path) -> None:
    path = tmp_path / "lengths.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"{path}:{line}: " if line else "no lengths"):
        bench_serve.read_lengths(path)


def test_lengths_within_a_context() -> None:
    assert bench_serve.within([(3, 4), (4, 4)], 7) == ((3, 4),)
    assert bench_serve.within([(3, 4), (4, 4)], None) == ((3, 4), (4, 4))
    with pytest.raises(ValueError, match="context of 6"):
        bench_serve.within([(3, 4), (4, 4)], 6)


def test_the_shared_trace_reads_as_lengths() -> None:
    path = Path(__file__).parents[3] / "shared" / "traces" / "azure_conv_lengths.csv"
    if not path.exists():
        pytest.skip(f"{path} is not on this machine")
    lengths = bench_serve.read_lengths(path)
    assert len(lengths) > 1000
    assert min(min(pair) for pair in lengths) >= 1


@pytest.mark.parametrize(
    "arguments",
    [["--rate", "0"], ["--concurrency", "-1"], ["--requests", "0"], ["--rate", "1", "--concurrency", "1"],
     ["--token-ids", "9:5"], ["--token-ids", "5"]],
)  # fmt: skip
def test_wrong_usage_of_the_load_client(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        bench_serve.parse_arguments(arguments)
    assert caught.value.code == 2
