"""A chat request, parsed: messages for the template and the shared fields. Pure; knows no tokeniser."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from helixd.api.body import Fields
from helixd.api.errors import bad_field, unsupported_field
from helixd.api.fields import CHAT_FIELDS, refuse_unsupported
from helixd.api.messages import Message, read_messages
from helixd.api.options import ApiOptions, Limits
from helixd.api.sampling_fields import MAX_TOKENS_BOUND, CommonFields, Target, read_common

Scalar = str | float | bool | None


@dataclass(frozen=True, slots=True)
class ChatCall:
    """`max_tokens`: None for the rest of the context. `scalars`: extra variables for the template."""

    messages: list[Message]
    max_tokens: int | None
    common: CommonFields
    add_generation_prompt: bool
    scalars: Mapping[str, Scalar]


def parse_chat(body: dict[str, Any], options: ApiOptions, target: Target) -> ChatCall:
    """Check a chat request's body. Raises ApiError (400 naming the field; 404 for an unknown model)."""
    return read_chat(Fields(body), body, options, target)


def read_chat(fields: Fields, body: dict[str, Any], options: ApiOptions, target: Target) -> ChatCall:
    """As `parse_chat`, reading through the given `fields`."""
    limits = options.limits
    common = read_common(fields, limits, target, _logprobs(fields, limits))
    refuse_unsupported(body, CHAT_FIELDS)
    return ChatCall(
        messages=read_messages(fields, limits),
        max_tokens=_max_tokens(fields),
        common=common,
        add_generation_prompt=fields.boolean("add_generation_prompt", default=True),
        scalars=read_scalars(fields, options.template_scalars),
    )


def _logprobs(fields: Fields, limits: Limits) -> int | None:
    wanted = fields.boolean("logprobs")
    top = fields.integer("top_logprobs", 0, limits.top_logprobs)
    if not wanted and top is not None:
        raise bad_field("top_logprobs", "is only allowed together with `logprobs`: true")
    return (top or 0) if wanted else None


def _max_tokens(fields: Fields) -> int | None:
    newer = fields.integer("max_completion_tokens", 1, MAX_TOKENS_BOUND)
    older = fields.integer("max_tokens", 1, MAX_TOKENS_BOUND)
    if newer is not None and older is not None and newer != older:
        raise bad_field("max_tokens", "and `max_completion_tokens` mean the same and must not differ")
    return newer if newer is not None else older


def read_scalars(fields: Fields, allowed: frozenset[str]) -> dict[str, Scalar]:
    """`chat_template_kwargs`: what a client may set for the template. Raises a 400 for anything else."""
    given = fields.object("chat_template_kwargs") or {}
    for name, value in given.items():
        if name not in allowed:
            names = ", ".join(sorted(allowed)) or "nothing"
            raise unsupported_field("chat_template_kwargs", f"may set {names} on this server and nothing else")
        if isinstance(value, dict | list):
            raise bad_field(f"chat_template_kwargs.{name}", "must be a string, a number, a boolean or null")
    return dict(given)
