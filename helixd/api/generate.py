"""The two endpoints that generate: /v1/chat/completions and /v1/completions.

Both go the same way: read the body; parse, render and tokenise on a thread; fly; answer whole or as a stream.
"""

from datetime import UTC, datetime

from aiohttp import web

from helixd.api.answers import json_answer
from helixd.api.body import parse_object
from helixd.api.chat_request import ChatCall, parse_chat
from helixd.api.chat_response import ChatChunks, chat_body
from helixd.api.collect import Collected
from helixd.api.completion_request import CompletionCall, parse_completion
from helixd.api.completion_response import CompletionChunks, completion_body
from helixd.api.envelope import Envelope, Json, new_id
from helixd.api.errors import of_failed
from helixd.api.fields import CHAT_FIELDS, COMPLETION_FIELDS, count_unknown
from helixd.api.flight import Flight, task_group
from helixd.api.middleware import request_id_of
from helixd.api.prepare import Prepared, prepare_chat, prepare_completion
from helixd.api.request_body import read_body
from helixd.api.sse import Chunks, stream_answer
from helixd.api.state import CLIENT, STATE, ApiState
from helixd.coordinator.generation import Event, Failed


async def chat_completions(request: web.Request) -> web.StreamResponse:
    """POST /v1/chat/completions."""
    state = request.app[STATE]
    with state.in_flight.slot(request[CLIENT]):
        raw = await read_body(request, state.options)
        envelope = _envelope(state, new_id("chatcmpl"))
        call, prepared = await state.threads.run(lambda: _read_chat(raw, state, envelope.id, request[CLIENT]))
        common = call.common
        tokenizer = state.text.tokenizer
        logprobs = common.sampling.logprobs is not None
        with _flight(request, state, prepared, "messages") as flight:
            if common.stream:
                chunks = ChatChunks(
                    envelope,
                    tokenizer,
                    n=common.n,
                    prompt_tokens=prepared.prompt_tokens,
                    logprobs=logprobs,
                    include_usage=common.include_usage,
                )
                return await _stream(request, state, flight, chunks)
            collected = await _collect(flight)
            return _whole(flight, chat_body(envelope, collected, prepared.prompt_tokens, tokenizer, logprobs=logprobs))


async def completions(request: web.Request) -> web.StreamResponse:
    """POST /v1/completions."""
    state = request.app[STATE]
    with state.in_flight.slot(request[CLIENT]):
        raw = await read_body(request, state.options)
        envelope = _envelope(state, new_id("cmpl"))
        call, prepared = await state.threads.run(lambda: _read_completion(raw, state, envelope.id, request[CLIENT]))
        tokenizer = state.text.tokenizer
        generate = call.max_tokens > 0
        with _flight(request, state, prepared, "prompt") as flight:
            if call.common.stream:
                chunks = CompletionChunks(
                    envelope, tokenizer, prepared, generate=generate, include_usage=call.common.include_usage
                )
                return await _stream(request, state, flight, chunks)
            collected = await _collect(flight)
            return _whole(flight, completion_body(envelope, collected, prepared, tokenizer, generate=generate))


def _read_chat(raw: bytes, state: ApiState, response_id: str, client: str) -> tuple[ChatCall, Prepared]:
    body = parse_object(raw, state.options.limits.json_depth)
    target = state.target()
    call = parse_chat(body, state.options, target)
    state.metrics.unknown_fields.inc(count_unknown(body, CHAT_FIELDS))
    return call, prepare_chat(call, state.text, state.options, target, response_id, client)


def _read_completion(raw: bytes, state: ApiState, response_id: str, client: str) -> tuple[CompletionCall, Prepared]:
    body = parse_object(raw, state.options.limits.json_depth)
    target = state.target()
    call = parse_completion(body, state.options, target)
    state.metrics.unknown_fields.inc(count_unknown(body, COMPLETION_FIELDS))
    return call, prepare_completion(call, state.text, state.options, target, response_id, client)


def _envelope(state: ApiState, response_id: str) -> Envelope:
    return state.envelope(response_id, int(datetime.now(UTC).timestamp()))


def _flight(request: web.Request, state: ApiState, prepared: Prepared, prompt_field: str) -> Flight:
    resource = request.match_info.route.resource
    path = resource.canonical if resource is not None else "unknown"
    return Flight(
        state.service, prepared, state.metrics, request_id=request_id_of(request), path=path, prompt_field=prompt_field
    )


async def _stream(request: web.Request, state: ApiState, flight: Flight, chunks: Chunks) -> web.StreamResponse:
    writer = await stream_answer(request, flight, chunks, state.options)
    if writer.slow:
        state.metrics.slow_client_aborts.inc()
    return writer.response


async def _collect(flight: Flight) -> Collected:
    requests = flight.prepared.requests
    collected = Collected(len(requests), requests[0].n)

    def sink(prompt: int, event: Event) -> None:
        if isinstance(event, Failed):
            raise of_failed(event)
        collected.add(prompt, event)

    async with task_group() as group:
        flight.start(group, sink)
    return collected


def _whole(flight: Flight, body: Json) -> web.Response:
    return json_answer(body, headers={**flight.route_headers, "x-helixd-retries": str(flight.retries)})
