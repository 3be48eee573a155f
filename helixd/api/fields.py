"""Which request fields are honoured, refused or ignored, as one table for parsing, /openapi.json and docs/api.md.

`honoured`: read, and it changes the answer as documented. `refused`: it asks for something this server does not do, so
any value but null and the listed neutral ones is a 400 that names it. `ignored`: it changes nothing in the answer.
A field in no table is unknown and ignored. A test compares the tables with the parser and with docs/api.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from helixd.api.errors import unsupported_field

Treatment = Literal["honoured", "refused", "ignored"]
Schema = Mapping[str, object]

_STRING: Schema = {"type": "string"}
_BOOLEAN: Schema = {"type": "boolean"}
_INTEGER: Schema = {"type": "integer"}


@dataclass(frozen=True, slots=True)
class Field:
    """One request field. `neutral`: values (beside null) of a refused field that ask for nothing."""

    name: str
    treatment: Treatment
    schema: Schema = field(default_factory=dict)
    neutral: tuple[object, ...] = ()
    required: bool = False


def _number(low: float, high: float) -> Schema:
    return {"type": "number", "minimum": low, "maximum": high}


def _honoured(name: str, schema: Schema, *, required: bool = False) -> Field:
    return Field(name, "honoured", schema, required=required)


def _refused(name: str, *neutral: object) -> Field:
    return Field(name, "refused", neutral=neutral)


def _ignored(name: str) -> Field:
    return Field(name, "ignored")


_SHARED = (
    _honoured("model", _STRING, required=True),
    _honoured("n", {"type": "integer", "minimum": 1}),
    _honoured("stream", _BOOLEAN),
    _honoured("stream_options", {"type": "object", "properties": {"include_usage": _BOOLEAN}}),
    _honoured("stop", {"oneOf": [_STRING, {"type": "array", "items": _STRING}]}),
    _honoured("seed", {"type": "integer", "format": "int64"}),
    _honoured("temperature", _number(0, 2)),
    _honoured("top_p", {"type": "number", "exclusiveMinimum": 0, "maximum": 1}),
    _honoured("presence_penalty", _number(-2, 2)),
    _honoured("frequency_penalty", _number(-2, 2)),
    _honoured("logit_bias", {"type": "object", "additionalProperties": _number(-100, 100)}),
    _honoured("top_k", {"type": "integer", "minimum": -1}),
    _honoured("min_p", _number(0, 1)),
    _honoured("repetition_penalty", {"type": "number", "exclusiveMinimum": 0, "maximum": 10}),
    _honoured("ignore_eos", _BOOLEAN),
    _honoured("stop_token_ids", {"type": "array", "items": _INTEGER}),
    _ignored("user"),
    _ignored("metadata"),
    _ignored("store"),
    _ignored("service_tier"),
    _ignored("safety_identifier"),
    _ignored("prompt_cache_key"),
    _ignored("prompt_cache_retention"),
    _ignored("prompt_cache_options"),
    # vLLM and friends: sampling or decoding that is not offered here.
    _refused("min_tokens", 0),
    _refused("use_beam_search", False),
    _refused("length_penalty", 1, 1.0),
    _refused("bad_words", []),
    _refused("allowed_token_ids"),
    _refused("prompt_logprobs", False),
    _refused("include_stop_str_in_output", False),
    _refused("skip_special_tokens", True),
    _refused("logits_processors", []),
    _refused("truncate_prompt_tokens"),
    _refused("structured_outputs"),
    _refused("guided_json"),
    _refused("guided_regex"),
    _refused("guided_choice"),
    _refused("guided_grammar"),
    _refused("grammar"),
    _refused("json_schema"),
    _refused("typical_p", 1, 1.0),
    _refused("mirostat", 0),
    _refused("dry_multiplier", 0, 0.0),
    _refused("xtc_probability", 0, 0.0),
    # Other servers' names for what has another name here, or is not offered.
    _refused("repeat_penalty", 1, 1.0),
    _refused("enable_thinking"),
    _refused("regex"),
    _refused("ebnf"),
    _refused("return_token_ids", False),
    _refused("return_tokens_as_token_ids", False),
)

CHAT_FIELDS = (
    _honoured("messages", {"type": "array", "minItems": 1, "items": {"type": "object"}}, required=True),
    *_SHARED,
    _honoured("max_completion_tokens", {"type": "integer", "minimum": 1}),
    _honoured("max_tokens", {"type": "integer", "minimum": 1}),
    _honoured("logprobs", _BOOLEAN),
    _honoured("top_logprobs", {"type": "integer", "minimum": 0}),
    _honoured("response_format", {"type": "object", "properties": {"type": {"const": "text"}}}),
    _honoured("chat_template_kwargs", {"type": "object"}),
    _honoured("add_generation_prompt", _BOOLEAN),
    _ignored("parallel_tool_calls"),
    _refused("tools", []),
    _refused("tool_choice", "none", "auto"),
    _refused("functions", []),
    _refused("function_call", "none", "auto"),
    _refused("modalities", ["text"]),
    _refused("audio"),
    _refused("prediction"),
    _refused("web_search_options"),
    _refused("moderation"),
    _refused("reasoning_effort", "none"),
    _refused("verbosity", "medium"),
    _refused("chat_template"),
    _refused("continue_final_message", False),
    _refused("documents", []),
    _refused("echo", False),
    _refused("best_of", 1),
)

COMPLETION_FIELDS = (
    _honoured(
        "prompt",
        {
            "oneOf": [
                _STRING,
                {"type": "array", "minItems": 1, "items": _STRING},
                {"type": "array", "minItems": 1, "items": _INTEGER},
                {"type": "array", "minItems": 1, "items": {"type": "array", "minItems": 1, "items": _INTEGER}},
            ]
        },
        required=True,
    ),
    *_SHARED,
    _honoured("max_tokens", {"type": "integer", "minimum": 0, "default": 16}),
    _honoured("logprobs", {"type": "integer", "minimum": 0}),
    _honoured("echo", _BOOLEAN),
    _honoured("best_of", {"type": "integer", "minimum": 1}),
    _honoured("add_special_tokens", _BOOLEAN),
    _honoured("response_format", {"type": "object", "properties": {"type": {"const": "text"}}}),
    _refused("max_completion_tokens"),
    _refused("suffix", ""),
    _refused("prompt_embeds"),
)

TOKENIZE_FIELDS = (
    _honoured("model", _STRING),
    _honoured("prompt", _STRING),
    _honoured("messages", {"type": "array", "minItems": 1, "items": {"type": "object"}}),
    _honoured("add_special_tokens", _BOOLEAN),
    _honoured("add_generation_prompt", _BOOLEAN),
    _honoured("chat_template_kwargs", {"type": "object"}),
    _honoured("return_token_strs", _BOOLEAN),
    _refused("tools", []),
    _refused("chat_template"),
    _refused("continue_final_message", False),
    _refused("documents", []),
)

DETOKENIZE_FIELDS = (
    _honoured("model", _STRING),
    _honoured("tokens", {"type": "array", "items": _INTEGER}, required=True),
)


def refuse_unsupported(body: Mapping[str, object], fields: tuple[Field, ...]) -> None:
    """Raise a 400 for the first refused field that is set to more than nothing."""
    for entry in fields:
        if entry.treatment != "refused":
            continue
        value = body.get(entry.name)
        if value is None or any(type(value) is type(neutral) and value == neutral for neutral in entry.neutral):
            continue
        raise unsupported_field(entry.name, "is not supported by this server; leave it out")


def count_unknown(body: Mapping[str, object], fields: tuple[Field, ...]) -> int:
    """How many of the body's fields are in no table (they are ignored, and counted)."""
    return len(body.keys() - {entry.name for entry in fields})


def request_schema(fields: tuple[Field, ...]) -> dict[str, object]:
    """The JSON schema of a request body, for /openapi.json: honoured fields, each of which may also be null."""
    properties: dict[str, object] = {}
    for entry in fields:
        if entry.treatment == "honoured":
            properties[entry.name] = entry.schema if entry.required else {"anyOf": [entry.schema, {"type": "null"}]}
    return {
        "type": "object",
        "properties": properties,
        "required": [entry.name for entry in fields if entry.required],
    }
