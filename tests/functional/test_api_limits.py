"""Both sides of every limit of a request: what is just allowed is answered, one more is refused by name."""

import dataclasses
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from helixd.api.options import ApiOptions, Limits
from tests.functional.api_world import MODEL, World, api_world
from tests.openai_shapes import validate_error

CHAT, LEGACY = "/v1/chat/completions", "/v1/completions"
LIMITS = Limits(
    n=2, prompts=2, messages=2, stop=2, stop_bytes=4, stop_token_ids=2, logit_bias=2, top_logprobs=2, json_depth=5,
    template_bytes=60,
)  # fmt: skip
BODY_BYTES = 400
HI = {"role": "user", "content": "hi"}
AROUND = len("user: \nassistant:")


def nested(levels: int) -> Any:
    return [nested(levels - 1)] if levels else []


# Field of Limits: path, body at the limit, body beyond it, the field that is blamed.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], str | None]] = {
    "n": (CHAT, {"n": 2}, {"n": 3}, "n"),
    "prompts": (LEGACY, {"prompt": ["a", "b"]}, {"prompt": ["a", "b", "c"]}, "prompt"),
    "messages": (CHAT, {"messages": [HI] * 2}, {"messages": [HI] * 3}, "messages"),
    "stop": (CHAT, {"stop": ["a", "b"]}, {"stop": ["a", "b", "c"]}, "stop"),
    "stop_bytes": (CHAT, {"stop": "äa!"}, {"stop": "ääa"}, "stop"),
    "stop_token_ids": (CHAT, {"stop_token_ids": [1, 2]}, {"stop_token_ids": [1, 2, 3]}, "stop_token_ids"),
    "logit_bias": (CHAT, {"logit_bias": {"1": 1, "2": 1}}, {"logit_bias": {"1": 1, "2": 1, "3": 1}}, "logit_bias"),
    "top_logprobs": (CHAT, {"logprobs": True, "top_logprobs": 2}, {"logprobs": True, "top_logprobs": 3},
                     "top_logprobs"),
    # The body itself is one level, and the innermost array another.
    "json_depth": (CHAT, {"metadata": nested(3)}, {"metadata": nested(4)}, None),
    "template_bytes": (CHAT, {"messages": [{"role": "user", "content": "x" * (60 - AROUND)}]},
                       {"messages": [{"role": "user", "content": "x" * (61 - AROUND)}]}, "messages"),
}  # fmt: skip


@pytest.fixture(scope="module")
def options() -> ApiOptions:
    return ApiOptions(limits=LIMITS, body_bytes=BODY_BYTES)


@pytest.fixture
async def world(options: ApiOptions) -> AsyncIterator[World]:
    async with api_world(options=options) as world:
        yield world


async def ask(url: str, body: bytes) -> tuple[int, Any]:
    headers = {"Content-Type": "application/json"}
    async with aiohttp.ClientSession() as session, session.post(url, data=body, headers=headers) as response:
        return response.status, await response.json()


def whole(path: str, body: dict[str, Any]) -> bytes:
    start: dict[str, Any] = {"messages": [HI]} if path == CHAT else {"prompt": "x"}
    return json.dumps({"model": MODEL, **start, **body}).encode()


def test_every_limit_has_a_case() -> None:
    assert set(CASES) == {field.name for field in dataclasses.fields(Limits)}


@pytest.mark.parametrize("name", CASES)
async def test_both_sides_of_a_limit(name: str, world: World) -> None:
    path, at, over, blamed = CASES[name]
    status, answer = await ask(world.url + path, whole(path, at))
    assert status == 200, answer
    asked = len(world.service.requests)
    status, answer = await ask(world.url + path, whole(path, over))
    validate_error(answer)
    assert (status, answer["error"]["param"]) == (400, blamed)
    assert len(world.service.requests) == asked, "what was refused reached nobody"


@pytest.mark.parametrize("chunked", [False, True])
async def test_both_sides_of_a_bodys_size(world: World, chunked: bool) -> None:
    async def pieces(body: bytes) -> AsyncIterator[bytes]:
        yield body[:100]
        yield body[100:]

    for size, expected in ((BODY_BYTES, 200), (BODY_BYTES + 1, 413)):
        body = whole(CHAT, {})
        body += b" " * (size - len(body))
        headers = {"Content-Type": "application/json"}
        data: Any = pieces(body) if chunked else body
        async with (
            aiohttp.ClientSession() as session,
            session.post(world.url + CHAT, data=data, headers=headers) as response,
        ):
            assert response.status == expected


@pytest.mark.parametrize(
    ("lines", "length", "expected"), [(2, 8000, 200), (2, 8300, 400), (120, 10, 200), (130, 10, 400)]
)
async def test_both_sides_of_the_headers(world: World, lines: int, length: int, expected: int) -> None:
    headers = {f"x-{number}": "h" * length for number in range(lines)}
    async with aiohttp.ClientSession() as session, session.get(world.url + "/healthz", headers=headers) as response:
        assert response.status == expected


async def test_limits_that_change_hold_for_what_comes_then(world: World, options: ApiOptions) -> None:
    """As a reload changes them."""
    state = world.state
    assert (await ask(world.url + CHAT, whole(CHAT, {"n": 3})))[0] == 400
    state.reconfigure(dataclasses.replace(options, limits=dataclasses.replace(LIMITS, n=3), body_bytes=4000))
    assert (await ask(world.url + CHAT, whole(CHAT, {"n": 3})))[0] == 200
    assert (await ask(world.url + CHAT, whole(CHAT, {"user": "u" * BODY_BYTES})))[0] == 200
    state.reconfigure(options)
    assert (await ask(world.url + CHAT, whole(CHAT, {"n": 3})))[0] == 400
    assert (await ask(world.url + CHAT, whole(CHAT, {"user": "u" * BODY_BYTES})))[0] == 413
