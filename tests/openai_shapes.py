"""Validators for OpenAI's published response shapes, for every test that holds an answer of the API.

The shapes are not part of this repository: they lie in ../shared beside it, and tests that need them skip without.
Validation is strict: an object with declared properties may have no others. Three places are wider than the published
shapes, as OpenAI's own API answers there: a streamed completions chunk has `finish_reason` and `usage` null, and the
first token of an echoed prompt has no log probability.
"""

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest

SHAPES = Path(__file__).resolve().parents[2] / "shared" / "api" / "openai-shapes.json"

Json = dict[str, Any]


def _strict(node: Any) -> Any:
    if isinstance(node, list):
        return [_strict(item) for item in node]
    if not isinstance(node, dict):
        return node
    # `properties` maps names to schemas: a property may itself be called "nullable" or "properties".
    out = {
        key: {name: _strict(schema) for name, schema in value.items()} if key == "properties" else _strict(value)
        for key, value in node.items()
        if key not in ("nullable", "discriminator", "example", "default", "deprecated")
    }
    if "properties" in out:
        out.setdefault("additionalProperties", False)
    return {"anyOf": [out, {"type": "null"}]} if node.get("nullable") is True else out


@cache
def _schemas() -> Json:
    if not SHAPES.exists():
        pytest.skip(f"OpenAI's response shapes are not beside this checkout ({SHAPES.name})")
    schemas: Json = _strict(json.loads(SHAPES.read_text())["components"]["schemas"])
    choice = schemas["CreateCompletionResponse"]["properties"]["choices"]["items"]
    logprobs = choice["properties"]["logprobs"]["anyOf"][0]["properties"]
    for name in ("token_logprobs", "top_logprobs"):
        items = logprobs[name]["items"]
        logprobs[name] = {
            "type": "array",
            "prefixItems": [{"anyOf": [items, {"type": "null"}]}],
            "items": items,
        }
    chunk = copy.deepcopy(schemas["CreateCompletionResponse"])
    for holder, name in ((chunk, "usage"), (chunk["properties"]["choices"]["items"], "finish_reason")):
        holder["properties"][name] = {"anyOf": [holder["properties"][name], {"type": "null"}]}
    schemas["CreateCompletionChunk"] = chunk
    return schemas


def _validate(value: Any, name: str) -> None:
    root = {"$ref": f"#/components/schemas/{name}", "components": {"schemas": _schemas()}}
    jsonschema.Draft202012Validator(root).validate(value)


def validate_chat_response(body: Json) -> None:
    """A whole chat answer."""
    _validate(body, "CreateChatCompletionResponse")


def validate_chat_chunk(body: Json) -> None:
    """One chunk of a streamed chat answer."""
    _validate(body, "CreateChatCompletionStreamResponse")


def validate_completion(body: Json) -> None:
    """A whole completions answer."""
    _validate(body, "CreateCompletionResponse")


def validate_completion_chunk(body: Json) -> None:
    """One chunk of a streamed completions answer."""
    _validate(body, "CreateCompletionChunk")


def validate_error(body: Json) -> None:
    """An error answer or event: exactly `{"error": {message, type, param, code}}`."""
    _validate(body, "ErrorResponse")


def validate_model_list(body: Json) -> None:
    """GET /v1/models."""
    _validate(body, "ListModelsResponse")


def validate_model(body: Json) -> None:
    """GET /v1/models/{id}."""
    _validate(body, "Model")


def sse_payloads(raw: bytes) -> list[str]:
    """The data of each event of a stream, comments left out; checks the framing."""
    assert raw.endswith(b"\n\n"), "a stream ends with a whole event"
    payloads = []
    for event in raw.decode().split("\n\n")[:-1]:
        assert "\n" not in event, "one line per event"
        if event.startswith(":"):
            continue
        assert event.startswith("data: ")
        payloads.append(event.removeprefix("data: "))
    return payloads
