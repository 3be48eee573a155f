"""How streams end badly: errors after the headers, clients that leave, clients that do not read; and silence."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import openai
import pytest

from helixd.api.options import ApiOptions
from helixd.coordinator.generation import Delta, Event, Failed, Finished, GenerationRequest, TokenText
from tests.functional.api_world import MODEL, FakeService, World, api_world, until
from tests.openai_shapes import sse_payloads, validate_error

CHAT = "/v1/chat/completions"
HI: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}


def word(text: str) -> Delta:
    return Delta(0, text, (TokenText(65),))


async def fails(request: GenerationRequest) -> AsyncIterator[Event]:
    yield word("one ")
    yield word("two")
    yield Failed("pipeline_lost", "node b was lost and no other route exists")


async def breaks(request: GenerationRequest) -> AsyncIterator[Event]:
    yield word("one ")
    raise LookupError("sesame")


async def ends_early(request: GenerationRequest) -> AsyncIterator[Event]:
    yield word("one ")


async def never_ends(request: GenerationRequest) -> AsyncIterator[Event]:
    while True:
        yield word("again ")
        await asyncio.sleep(0.001)


async def never_begins(request: GenerationRequest) -> AsyncIterator[Event]:
    await asyncio.Event().wait()
    yield word("unreachable")


async def metric(world: World, line: str) -> bool:
    async with aiohttp.ClientSession() as session, session.get(world.url + "/metrics") as response:
        return line in (await response.text()).splitlines()


@pytest.mark.parametrize(
    ("script", "code"), [(fails, "pipeline_lost"), (breaks, "internal_error"), (ends_early, "internal_error")]
)
async def test_an_error_after_the_headers_is_an_event_and_no_done(script: Any, code: str) -> None:
    async with api_world(FakeService(script)) as world:
        async with aiohttp.ClientSession() as session, session.post(world.url + CHAT, json={**HI, "stream": True}) as r:
            assert r.status == 200
            raw = await r.read()
        *chunks, last = [json.loads(payload) for payload in sse_payloads(raw)]
        validate_error(last)
        assert last["error"]["code"] == code
        assert last["error"]["type"] == "server_error"
        if script is fails:
            assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == "one two"
        assert b"[DONE]" not in raw
        assert b"sesame" not in raw


async def test_the_client_raises_the_error_of_a_stream() -> None:
    async with api_world(FakeService(fails)) as world:
        client = openai.AsyncOpenAI(base_url=f"{world.url}/v1", api_key="EMPTY", max_retries=0)
        stream = await client.chat.completions.create(**HI, stream=True)
        texts = []

        async def read() -> None:
            async for chunk in stream:
                texts.append(chunk.choices[0].delta.content)

        with pytest.raises(openai.APIError, match="node b was lost"):
            await read()
        assert texts == ["", "one ", "two"]


@pytest.mark.parametrize(("code", "status"), [("pipeline_lost", 503), ("timeout", 504), ("internal_error", 500)])
async def test_a_failed_generation_has_a_status_when_it_is_not_streamed(code: str, status: int) -> None:
    async def script(request: GenerationRequest) -> AsyncIterator[Event]:
        yield word("one ")
        yield Failed(code, "it failed")

    async with (
        api_world(FakeService(script)) as world,
        aiohttp.ClientSession() as session,
        session.post(world.url + CHAT, json=HI) as response,
    ):
        body = await response.json()
        validate_error(body)
        assert (response.status, body["error"]["code"]) == (status, code)
        assert response.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("script", [never_ends, never_begins])
async def test_a_client_that_leaves_cancels_its_generation(stream: bool, script: Any) -> None:
    # A slow cancel shows that it is waited for even though the handler itself is cancelled.
    async with api_world(FakeService(script, slow_cancel_s=0.05)) as world:
        async with aiohttp.ClientSession() as session, asyncio.TaskGroup() as group:

            async def ask() -> None:
                async with session.post(world.url + CHAT, json={**HI, "stream": stream}) as response:
                    await response.read()

            task = group.create_task(ask(), name="client")
            await until(lambda: world.service.generations)
            task.cancel()
        [generation] = world.service.generations
        async with asyncio.timeout(10):
            await generation.cancelled.wait()
        line = f'helixd_request_success_total{{finished_reason="abort",model_name="{MODEL}"}} 1.0'
        await until(lambda: world.service.generations[0].cancelled.is_set())
        async with asyncio.timeout(10):
            while not await metric(world, line):
                await asyncio.sleep(0.005)


async def test_a_client_that_leaves_the_queue_is_no_longer_waited_for() -> None:
    async with api_world(FakeService(hold=asyncio.Event())) as world:
        async with aiohttp.ClientSession() as session:
            with pytest.raises(TimeoutError):
                await session.post(world.url + CHAT, json=HI, timeout=aiohttp.ClientTimeout(total=0.2))
        async with asyncio.timeout(10):
            await world.service.submit_cancelled.wait()
        assert world.service.generations == []


async def test_every_prompt_of_a_client_that_leaves_is_cancelled() -> None:
    async with api_world(FakeService(never_ends)) as world:
        async with aiohttp.ClientSession() as session:
            body = {"model": MODEL, "prompt": ["a", "b", "c"], "stream": True}
            async with session.post(world.url + "/v1/completions", json=body) as response:
                await response.content.readany()
                response.close()
        async with asyncio.timeout(10):
            for generation in world.service.generations:
                await generation.cancelled.wait()
        assert len(world.service.generations) == 3


async def test_a_reader_that_does_not_read_is_cut_off_and_others_go_on() -> None:
    async def floods(request: GenerationRequest) -> AsyncIterator[Event]:
        while True:
            yield word("x" * 65536)
            await asyncio.sleep(0)

    service = FakeService(floods)
    async with api_world(service, ApiOptions(write_stall_s=0.2)) as world:
        reader, writer = await asyncio.open_connection(world.bound.host, world.bound.port, limit=1024)
        body = json.dumps({**HI, "stream": True}).encode()
        writer.write(
            f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")
        async with asyncio.timeout(20):
            await service.generations[0].cancelled.wait()
        assert await metric(world, "helixd_slow_client_aborts_total 1.0")

        # What was on its way may still come; the end of the body does not.
        rest = b""
        async with asyncio.timeout(10):
            with contextlib.suppress(ConnectionError):
                while data := await reader.read(65536):
                    rest = data
        assert not rest.endswith(b"0\r\n\r\n")
        writer.close()


async def test_a_silent_stream_says_that_it_lives() -> None:
    speak = asyncio.Event()

    async def pauses(request: GenerationRequest) -> AsyncIterator[Event]:
        await speak.wait()
        yield word("at last")
        yield Finished(0, "stop", 1)

    async with api_world(FakeService(pauses), ApiOptions(keep_alive_s=0.02)) as world:
        client = openai.AsyncOpenAI(base_url=f"{world.url}/v1", api_key="EMPTY", max_retries=0)
        async with client.chat.completions.with_streaming_response.create(**HI, stream=True) as response:
            seen = b""
            async for data in response.iter_bytes():
                seen += data
                if seen.count(b": keep-alive\n\n") >= 2:
                    speak.set()
            assert seen.endswith(b"data: [DONE]\n\n")
            assert b"at last" in seen


async def test_a_stream_begins_before_the_first_token() -> None:
    async with (
        api_world(FakeService(never_begins)) as world,
        aiohttp.ClientSession() as session,
        session.post(world.url + CHAT, json={**HI, "stream": True}) as response,
    ):
        async with asyncio.timeout(10):
            first = await response.content.readuntil(b"\n\n")
        assert json.loads(first.removeprefix(b"data: "))["choices"][0]["delta"]["role"] == "assistant"
        assert response.headers["x-helixd-route"] == "a[0,4) -> b[4,8)"


async def test_leaving_the_server_ends_what_runs() -> None:
    service = FakeService(never_ends)
    async with aiohttp.ClientSession() as session:
        async with api_world(service, ApiOptions(shutdown_timeout_s=0.05)) as world:
            response = await session.post(world.url + CHAT, json={**HI, "stream": True})
            await response.content.readany()
        assert service.generations[0].cancelled.is_set()
        response.close()
