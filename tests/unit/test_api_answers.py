"""Events to JSON: whole answers, chunks, log probabilities; and the buffer between them and the socket."""

import asyncio
import math
from dataclasses import replace
from typing import Any

import pytest

from helixd.api.chat_response import ChatChunks, chat_body
from helixd.api.collect import Collected
from helixd.api.completion_response import CompletionChunks, completion_body
from helixd.api.envelope import Envelope
from helixd.api.logprobs import LegacyLogprobs, chat_logprobs
from helixd.api.output import OutputBuffer
from helixd.api.prepare import Prepared
from helixd.coordinator.generation import Delta, Event, Finished, GenerationRequest, PromptScored, TokenText
from helixd.ids import RequestId
from helixd.sampling import SamplingParams, TokenLogprobs
from tests.functional.api_world import ByteTokenizer
from tests.openai_shapes import (
    validate_chat_chunk,
    validate_chat_response,
    validate_completion,
    validate_completion_chunk,
)

ENVELOPE = Envelope("id-1", 1_700_000_000, "tiny", "fp")
TOKENS = ByteTokenizer()


def delta(choice: int, text: str, logprob: float | None = None) -> Delta:
    logprobs = None if logprob is None else TokenLogprobs(logprob, ((65, logprob), (66, -3.0)))
    return Delta(choice, text, tuple(TokenText(byte, logprobs) for byte in text.encode()))


def prepared(*prompts: bytes, n: int = 1, logprobs: int | None = None, echo: bool = False) -> Prepared:
    request = GenerationRequest(
        RequestId("r"),
        (),
        n,
        5,
        SamplingParams(seed=1, logprobs=logprobs),
        prompt_logprobs=echo and logprobs is not None,
    )
    requests = tuple(replace(request, prompt=tuple(prompt)) for prompt in prompts)
    return Prepared("id-1", requests, tuple(prompt.decode() for prompt in prompts) if echo else ())


def collected(prompts: int, n: int, events: list[tuple[int, Event]]) -> Collected:
    result = Collected(prompts, n)
    for prompt, event in events:
        result.add(prompt, event)
    return result


def chunks_of(chunks: Any, events: list[tuple[int, Event]]) -> list[dict[str, Any]]:
    return [
        *chunks.opening(),
        *(chunk for prompt, event in events for chunk in chunks.of(prompt, event)),
        *chunks.closing(),
    ]


CHAT_EVENTS: list[tuple[int, Event]] = [
    (0, delta(0, "a", -0.5)),
    (0, delta(1, "b", -0.5)),
    (0, Finished(1, "length", 1)),
    (0, Delta(0, "", (TokenText(0xC3, TokenLogprobs(-math.inf)),))),
    (0, Delta(0, "ä", (TokenText(0xA4, TokenLogprobs(-1.0)),))),
    (0, Finished(0, "stop", 3)),
]


def test_a_whole_chat_answer() -> None:
    body: Any = chat_body(ENVELOPE, collected(1, 2, CHAT_EVENTS), 7, TOKENS, logprobs=True)
    validate_chat_response(body)
    assert [choice["message"]["content"] for choice in body["choices"]] == ["aä", "b"]
    assert [choice["finish_reason"] for choice in body["choices"]] == ["stop", "length"]
    assert body["usage"] == {"prompt_tokens": 7, "completion_tokens": 4, "total_tokens": 11}
    content = body["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in content] == ["a", "\\xc3", "\\xa4"]
    assert content[1]["logprob"] == -9999.0
    assert [entry["bytes"] for entry in content] == [[97], [0xC3], [0xA4]]
    plain: Any = chat_body(ENVELOPE, collected(1, 2, CHAT_EVENTS), 7, TOKENS, logprobs=False)
    assert plain["choices"][0]["logprobs"] is None


@pytest.mark.parametrize("include_usage", [True, False])
@pytest.mark.parametrize("logprobs", [True, False])
def test_chat_chunks_add_up_to_the_whole_answer(include_usage: bool, logprobs: bool) -> None:
    source = ChatChunks(ENVELOPE, TOKENS, n=2, prompt_tokens=7, logprobs=logprobs, include_usage=include_usage)
    chunks = chunks_of(source, CHAT_EVENTS)
    for chunk in chunks:
        validate_chat_chunk(chunk)
        assert (chunk["id"], chunk["created"], chunk["model"]) == ("id-1", 1_700_000_000, "tiny")
    whole: Any = chat_body(ENVELOPE, collected(1, 2, CHAT_EVENTS), 7, TOKENS, logprobs=logprobs)
    if include_usage:
        assert chunks[-1]["choices"] == []
        assert chunks.pop()["usage"] == whole["usage"]
        assert all(chunk["usage"] is None for chunk in chunks)
    else:
        assert not any("usage" in chunk for chunk in chunks)
    for index in range(2):
        mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert mine[-1]["delta"] == {}
        assert [choice["finish_reason"] for choice in mine[:-1]] == [None] * (len(mine) - 1)
        assert mine[-1]["finish_reason"] == whole["choices"][index]["finish_reason"]
        assert (
            "".join(choice["delta"].get("content", "") for choice in mine)
            == whole["choices"][index]["message"]["content"]
        )
        if logprobs:
            streamed = [entry for choice in mine if choice["logprobs"] for entry in choice["logprobs"]["content"]]
            assert streamed == whole["choices"][index]["logprobs"]["content"]
        else:
            assert all(choice["logprobs"] is None for choice in mine)


def test_text_that_is_held_back_makes_no_chunk() -> None:
    source = ChatChunks(ENVELOPE, TOKENS, n=1, prompt_tokens=1, logprobs=False, include_usage=False)
    assert source.of(0, Delta(0, "", (TokenText(0xC3),))) == []


COMPLETION_EVENTS: list[tuple[int, Event]] = [
    (1, PromptScored((None, TokenLogprobs(-0.1, ((1, -0.1),))))),
    (1, delta(0, "x", -0.5)),
    (0, PromptScored((None,))),
    (1, Finished(0, "length", 1)),
    (0, Delta(0, "é", (TokenText(0xC3, TokenLogprobs(-1.0)), TokenText(0xA9, TokenLogprobs(-2.0))))),
    (0, delta(0, "y", -0.5)),
    (0, Finished(0, "stop", 3)),
]


@pytest.mark.parametrize("generate", [True, False])
def test_completion_chunks_add_up_to_the_whole_answer(generate: bool) -> None:
    asked = prepared(b"p", b"qr", logprobs=1, echo=True)
    whole: Any = completion_body(ENVELOPE, collected(2, 1, COMPLETION_EVENTS), asked, TOKENS, generate=generate)
    validate_completion(whole)
    source = CompletionChunks(ENVELOPE, TOKENS, asked, generate=generate, include_usage=True)
    chunks = chunks_of(source, COMPLETION_EVENTS)
    for chunk in chunks:
        validate_completion_chunk(chunk)
    assert chunks.pop()["usage"] == whole["usage"]
    assert [choice["text"] for choice in whole["choices"]] == (["péy", "qrx"] if generate else ["p", "qr"])
    assert whole["usage"]["completion_tokens"] == (4 if generate else 0)
    assert whole["usage"]["prompt_tokens"] == 3
    for index in range(2):
        mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        choice = whole["choices"][index]
        assert "".join(part["text"] for part in mine) == choice["text"]
        assert mine[-1]["finish_reason"] == choice["finish_reason"]
        for name, values in choice["logprobs"].items():
            assert [value for part in mine if part["logprobs"] for value in part["logprobs"][name]] == values


def test_legacy_logprobs_follow_the_text() -> None:
    legacy = LegacyLogprobs(TOKENS)
    for byte in "aéb".encode():
        legacy.add(byte, TokenLogprobs(-1.0, ((65, -0.5),)))
    block: Any = legacy.take()
    assert block["tokens"] == ["a", "bytes:\\xc3", "bytes:\\xa9", "b"]
    assert block["text_offset"] == [0, 1, 1, 2]
    assert block["top_logprobs"][0] == {"A": -0.5, "a": -1.0}


def test_special_tokens_have_no_width() -> None:
    class Marked(ByteTokenizer):
        special_ids = frozenset(b"^")

    legacy = LegacyLogprobs(Marked())
    for byte in b"^ab^":
        legacy.add(byte, None)
    assert legacy.take()["text_offset"] == [0, 0, 1, 2]


def test_what_json_cannot_hold_is_the_lowest_number() -> None:
    for value in (-math.inf, math.nan, -1e9):
        [entry] = chat_logprobs((TokenText(65, TokenLogprobs(value)),), TOKENS)["content"]  # type: ignore[misc]
        assert entry["logprob"] == -9999.0


async def test_a_full_buffer_joins_text_of_the_same_choice() -> None:
    buffer = OutputBuffer(3, producers=1)
    for text in "abcdef":
        buffer.put(0, delta(0, text))
    buffer.put(0, delta(1, "x"))
    buffer.put(0, delta(1, "y"))
    buffer.put(0, Finished(0, "stop", 6))
    assert len(buffer) == 5
    taken = await buffer.take()
    texts = [event.text if isinstance(event, Delta) else "end" for _, event in taken]
    assert texts == ["a", "b", "cdef", "xy", "end"]
    assert taken[2][1] == delta(0, "cdef")


async def test_a_buffer_with_room_keeps_events_apart() -> None:
    buffer = OutputBuffer(3, producers=1)
    for text in "abc":
        buffer.put(0, delta(0, text))
    assert [event for _, event in await buffer.take()] == [delta(0, text) for text in "abc"]
    buffer.put(0, delta(0, "d"))
    assert await buffer.take() == [(0, delta(0, "d"))]


async def test_a_buffer_ends_with_its_last_producer() -> None:
    buffer = OutputBuffer(3, producers=2)
    buffer.end()
    async with asyncio.TaskGroup() as group:
        task = group.create_task(buffer.take(), name="reader")
        await asyncio.sleep(0)
        assert not task.done()
        buffer.end()
    assert task.result() == []
