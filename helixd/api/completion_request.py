"""A legacy completions request, parsed: one or several prompts, as text or token ids. Pure; knows no tokeniser."""

from dataclasses import dataclass
from typing import Any

from helixd.api.body import Fields
from helixd.api.errors import bad_field, unsupported_field
from helixd.api.fields import COMPLETION_FIELDS, refuse_unsupported
from helixd.api.options import ApiOptions, Limits
from helixd.api.sampling_fields import MAX_TOKENS_BOUND, CommonFields, Target, check_token_ids, read_common

Prompt = str | tuple[int, ...]

# OpenAI's default for this endpoint.
DEFAULT_MAX_TOKENS = 16


@dataclass(frozen=True, slots=True)
class CompletionCall:
    """`max_tokens` may be 0: then nothing is generated, which with `echo` and `logprobs` scores the prompt."""

    prompts: tuple[Prompt, ...]
    max_tokens: int
    echo: bool
    add_special_tokens: bool
    common: CommonFields


def parse_completion(body: dict[str, Any], options: ApiOptions, target: Target) -> CompletionCall:
    """Check a completions request's body. Raises ApiError (400 naming the field; 404 for an unknown model)."""
    return read_completion(Fields(body), body, options, target)


def read_completion(fields: Fields, body: dict[str, Any], options: ApiOptions, target: Target) -> CompletionCall:
    """As `parse_completion`, reading through the given `fields`."""
    limits = options.limits
    common = read_common(fields, limits, target, fields.integer("logprobs", 0, limits.top_logprobs))
    refuse_unsupported(body, COMPLETION_FIELDS)
    best_of = fields.integer("best_of", 1, limits.n)
    if best_of is not None and best_of != common.n:
        raise unsupported_field("best_of", "must equal `n`: this server does not rank choices")
    max_tokens = fields.integer("max_tokens", 0, MAX_TOKENS_BOUND)
    return CompletionCall(
        prompts=_prompts(fields, limits, target.vocab_size),
        max_tokens=DEFAULT_MAX_TOKENS if max_tokens is None else max_tokens,
        echo=fields.boolean("echo"),
        add_special_tokens=fields.boolean("add_special_tokens", default=True),
        common=common,
    )


def _prompts(fields: Fields, limits: Limits, vocab_size: int) -> tuple[Prompt, ...]:
    given = fields.raw("prompt")
    if given is None:
        raise bad_field("prompt", "is required")
    if isinstance(given, str):
        return (given,)
    if not isinstance(given, list) or not given:
        raise bad_field("prompt", "must be a string, or an array (not empty) of strings, token ids or arrays of ids")
    if isinstance(given[0], int):
        return (check_token_ids("prompt", given, vocab_size),)
    if len(given) > limits.prompts:
        raise bad_field("prompt", f"must hold at most {limits.prompts} prompts, not {len(given)}")
    if all(isinstance(prompt, str) for prompt in given):
        return tuple(given)
    if all(isinstance(prompt, list) and prompt for prompt in given):
        return tuple(check_token_ids("prompt", prompt, vocab_size) for prompt in given)
    raise bad_field("prompt", "must not mix strings, token ids and arrays, nor hold an empty array")
