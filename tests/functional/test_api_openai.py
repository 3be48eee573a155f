"""The real `openai` client against a real API in front of a fake coordinator; every answer in OpenAI's shapes."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import openai
import pytest

from helixd.coordinator.generation import Refused
from tests.functional.api_world import CONTEXT_TOKENS, MODEL, FakeService, World, api_world, say, until
from tests.openai_shapes import (
    sse_payloads,
    validate_chat_chunk,
    validate_chat_response,
    validate_completion,
    validate_completion_chunk,
    validate_error,
    validate_model,
    validate_model_list,
)

HI: Any = [{"role": "user", "content": "hi"}]


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with api_world() as world:
        yield world


def client_of(world: World) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{world.url}/v1", api_key="EMPTY", max_retries=0)


async def raw_stream(world: World, path: str, **body: Any) -> list[Any]:
    """The parsed chunks of a stream that must end well, each of its bytes seen."""
    async with (
        aiohttp.ClientSession() as session,
        session.post(world.url + path, json={"model": MODEL, "stream": True, **body}) as response,
    ):
        assert response.status == 200
        assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        assert response.headers["Cache-Control"] == "no-cache"
        assert response.headers["X-Accel-Buffering"] == "no"
        assert "Content-Encoding" not in response.headers
        *payloads, last = sse_payloads(await response.read())
    assert last == "[DONE]"
    return [json.loads(payload) for payload in payloads]


async def test_a_chat_answer_through_the_async_client(world: World) -> None:
    raw = await client_of(world).chat.completions.with_raw_response.create(
        model=MODEL, messages=HI, n=2, logprobs=True, top_logprobs=3, seed=-5, temperature=0.5, max_completion_tokens=9,
        stop=["\n"], logit_bias={"7": -1}, presence_penalty=0.5, frequency_penalty=-0.5, top_p=0.9, user="u",
        metadata={"a": "b"}, store=True, response_format={"type": "text"}, parallel_tool_calls=False,
        extra_headers={"x-request-id": "mine-1"},
        extra_body={"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "ignore_eos": True, "stop_token_ids": [3]},
    )  # fmt: skip
    validate_chat_response((await raw.http_response.aread()) and raw.http_response.json())
    assert raw.headers["x-request-id"] == "mine-1"
    assert raw.headers["x-helixd-route"] == "a[0,4) -> b[4,8)"
    assert raw.headers["x-helixd-retries"] == "0"
    answer = raw.parse()
    assert [choice.message.content for choice in answer.choices] == ["Hello", "Hello"]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len("user: hi\nassistant:"), 10)
    logprobs = answer.choices[1].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert [entry.token for entry in logprobs.content] == list("Hello")
    assert len(logprobs.content[0].top_logprobs) == 3

    [request] = world.service.requests
    sampling = request.sampling
    assert bytes(request.prompt) == b"user: hi\nassistant:"
    assert (request.n, request.max_tokens, request.stop) == (2, 9, ("\n",))
    assert (request.stop_token_ids, request.ignore_eos, request.deadline_s) == ((3,), True, 600.0)
    assert (sampling.seed, sampling.temperature, sampling.top_p, sampling.top_k) == (2**64 - 5, 0.5, 0.9, 5)
    assert (sampling.min_p, sampling.repetition_penalty) == (0.1, 1.1)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.5, -0.5)
    assert (sampling.logit_bias, sampling.logprobs) == (((7, -1.0),), 3)


async def test_the_sync_client_streams_and_does_not() -> None:
    async with api_world(FakeService(say("grüß dich ☃"))) as world:

        def talk() -> tuple[str | None, str]:
            client = openai.OpenAI(base_url=f"{world.url}/v1", api_key="EMPTY", max_retries=0)
            whole = client.chat.completions.create(model=MODEL, messages=HI)
            stream = client.chat.completions.create(model=MODEL, messages=HI, stream=True)
            return whole.choices[0].message.content, "".join(chunk.choices[0].delta.content or "" for chunk in stream)

        assert await asyncio.to_thread(talk) == ("grüß dich ☃", "grüß dich ☃")


async def test_the_stream_helper_sees_the_same_answer(world: World) -> None:
    async with client_of(world).chat.completions.stream(model=MODEL, messages=HI) as stream:
        events = [event.type async for event in stream]
        final = await stream.get_final_completion()
    assert final.choices[0].message.content == "Hello"
    # One per chunk with content: the role's, which is empty, and five of text.
    assert events.count("content.delta") == 6


@pytest.mark.parametrize("include_usage", [True, False])
async def test_every_chat_chunk_has_openais_shape(world: World, include_usage: bool) -> None:
    chunks = await raw_stream(
        world, "/v1/chat/completions", messages=HI, n=2, logprobs=True, top_logprobs=1,
        stream_options={"include_usage": include_usage},
    )  # fmt: skip
    for chunk in chunks:
        validate_chat_chunk(chunk)
    assert len({(chunk["id"], chunk["created"], chunk["model"], chunk["system_fingerprint"]) for chunk in chunks}) == 1
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [bool(chunk["choices"]) for chunk in chunks].count(False) == include_usage
    if include_usage:
        assert chunks[-1]["usage"]["completion_tokens"] == 10
        assert all(chunk["usage"] is None for chunk in chunks[:-1])


async def test_completions_of_several_prompts_with_echo_and_logprobs(world: World) -> None:
    raw = await client_of(world).completions.with_raw_response.create(
        model=MODEL, prompt=["ab", "c"], n=2, best_of=2, echo=True, logprobs=2, max_tokens=5
    )
    await raw.http_response.aread()
    validate_completion(raw.http_response.json())
    answer = raw.parse()
    assert [(choice.index, choice.text) for choice in answer.choices] == [
        (0, "abHello"), (1, "abHello"), (2, "cHello"), (3, "cHello"),
    ]  # fmt: skip
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens == list("abHello")
    assert logprobs.token_logprobs is not None
    assert logprobs.token_logprobs[0] is None
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 20)
    ids = {request.request_id for request in world.service.requests}
    assert len(ids) == 2
    assert len({request.sampling.seed for request in world.service.requests}) == 2
    assert all(request.prompt_logprobs for request in world.service.requests)


async def test_one_seed_is_the_seed_of_every_prompt(world: World) -> None:
    await client_of(world).completions.create(model=MODEL, prompt=["a", "b"], seed=7)
    assert [request.sampling.seed for request in world.service.requests] == [7, 7]


@pytest.mark.parametrize("prompt", ["hi", ["hi"], [104, 105], [[104, 105]]])
async def test_a_prompt_may_be_text_or_ids(world: World, prompt: Any) -> None:
    answer = await client_of(world).completions.create(model=MODEL, prompt=prompt, echo=True)
    assert answer.choices[0].text == "hiHello"
    assert [bytes(request.prompt) for request in world.service.requests] == [b"hi"]
    assert [request.max_tokens for request in world.service.requests] == [16]


async def test_every_completion_chunk_has_openais_shape(world: World) -> None:
    chunks = await raw_stream(
        world, "/v1/completions", prompt=["ab", "c"], n=2, echo=True, logprobs=1, stream_options={"include_usage": True}
    )
    for chunk in chunks:
        validate_completion_chunk(chunk)
    assert chunks[-1]["usage"]["total_tokens"] == 23
    for index, text in enumerate(["abHello", "abHello", "cHello", "cHello"]):
        mine = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
        assert "".join(choice["text"] for choice in mine) == text
        assert mine[-1]["finish_reason"] == "stop"


async def test_no_tokens_and_echo_score_a_prompt(world: World) -> None:
    answer = await client_of(world).completions.create(model=MODEL, prompt="abc", max_tokens=0, echo=True, logprobs=0)
    choice = answer.choices[0]
    assert (choice.text, choice.finish_reason) == ("abc", "length")
    assert choice.logprobs is not None
    assert choice.logprobs.token_logprobs == [None, -0.25, -0.25]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 0


async def test_models_are_listed_once_they_are_ready() -> None:
    async with api_world(FakeService(ready=False)) as world:
        client = client_of(world)
        assert [model.id async for model in client.models.list()] == []
        with pytest.raises(openai.InternalServerError) as caught:
            await client.models.retrieve(MODEL)
        assert caught.value.status_code == 503
        world.service.ready = True
        raw = await client.models.with_raw_response.list()
        await raw.http_response.aread()
        validate_model_list(raw.http_response.json())
        one = await client.models.with_raw_response.retrieve(MODEL)
        await one.http_response.aread()
        validate_model(one.http_response.json())
        assert one.parse().id == MODEL
        with pytest.raises(openai.NotFoundError) as missing:
            await client.models.retrieve("org/other")
        assert (missing.value.code, missing.value.param) == ("model_not_found", "model")


async def refusal(world: World, **fields: Any) -> openai.APIStatusError:
    with pytest.raises(openai.APIStatusError) as caught:
        await client_of(world).chat.completions.create(**{"model": MODEL, "messages": HI, **fields})
    validate_error({"error": caught.value.body})
    assert caught.value.request_id
    return caught.value


@pytest.mark.parametrize("stream", [True, False])
async def test_bad_requests_raise_the_clients_own_errors(world: World, stream: bool) -> None:
    error = await refusal(world, stream=stream, temperature=3)
    assert isinstance(error, openai.BadRequestError)
    assert (error.param, error.type, error.code) == ("temperature", "invalid_request_error", None)
    tools: Any = [{"type": "function", "function": {"name": "f"}}]
    error = await refusal(world, stream=stream, tools=tools)
    assert (error.param, error.code) == ("tools", "unsupported_parameter")
    error = await refusal(world, stream=stream, model="other")
    assert isinstance(error, openai.NotFoundError)
    assert (error.param, error.code) == ("model", "model_not_found")
    error = await refusal(world, stream=stream, messages=[{"role": "user", "content": "x", "name": "nobody"}])
    assert error.param == "messages"
    assert "nobody are not known" in error.message
    assert world.service.requests == []


async def test_a_prompt_that_fills_the_context_leaves_room_for_one_token(world: World) -> None:
    overhead = len("user: \nassistant:")

    def of(tokens: int) -> Any:
        return [{"role": "user", "content": "x" * (tokens - overhead)}]

    await client_of(world).chat.completions.create(model=MODEL, messages=of(CONTEXT_TOKENS - 1))
    await client_of(world).chat.completions.create(model=MODEL, messages=of(CONTEXT_TOKENS - 4), max_tokens=4)
    for fields in ({"messages": of(CONTEXT_TOKENS)}, {"messages": of(CONTEXT_TOKENS - 4), "max_tokens": 5}):
        error = await refusal(world, **fields)
        assert (error.status_code, error.code, error.param) == (400, "context_length_exceeded", "messages")
        assert str(CONTEXT_TOKENS) in error.message


async def test_a_prompt_that_no_pipeline_can_hold_names_its_field() -> None:
    too_long = Refused(400, "context_length_exceeded", "more than the KV cache of any pipeline")
    async with api_world(FakeService(refusal=too_long)) as world:
        assert (await refusal(world)).param == "messages"
        with pytest.raises(openai.BadRequestError) as caught:
            await client_of(world).completions.create(model=MODEL, prompt="x")
        assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "prompt")


async def test_a_queue_that_is_full_is_a_rate_limit() -> None:
    full = Refused(429, "rate_limit_exceeded", "the queue is full", retry_after_s=2.5)
    async with api_world(FakeService(refusal=full)) as world:
        error = await refusal(world, stream=True)
        assert isinstance(error, openai.RateLimitError)
        assert error.type == "rate_limit_error"
        assert error.response.headers["Retry-After"] == "3"


@pytest.mark.parametrize(("permanent", "attempts"), [(True, 1), (False, 2)])
async def test_the_client_repeats_only_what_may_pass(permanent: bool, attempts: int) -> None:
    refused = Refused(
        503, "no_feasible_placement", "needs 38.2 GiB, the cluster offers 24.0", permanent=permanent, retry_after_s=0.01
    )
    async with api_world(FakeService(refusal=refused)) as world:
        client = openai.AsyncOpenAI(base_url=f"{world.url}/v1", api_key="EMPTY", max_retries=1)
        with pytest.raises(openai.InternalServerError) as caught:
            await client.chat.completions.create(model=MODEL, messages=HI)
        assert caught.value.code == "no_feasible_placement"
        assert len(world.service.requests) == attempts


async def test_one_refused_prompt_refuses_the_request_and_cancels_the_others() -> None:
    service = FakeService(say("x" * 100_000))

    async def second_is_refused(request: Any) -> None:
        if bytes(request.prompt) == b"b":
            await until(lambda: service.generations)
            raise Refused(429, "rate_limit_exceeded", "the queue is full")

    service.before_admission = second_is_refused
    async with api_world(service) as world:
        for stream in (False, True):
            with pytest.raises(openai.RateLimitError):
                await client_of(world).completions.create(model=MODEL, prompt=["a", "b"], stream=stream)
            assert service.generations.pop().cancelled.is_set()
