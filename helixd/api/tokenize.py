"""/tokenize and /detokenize, in the shape vLLM's clients know."""

from typing import Any

from aiohttp import web

from helixd.api.answers import json_answer
from helixd.api.body import Fields, parse_object
from helixd.api.chat_request import read_scalars
from helixd.api.envelope import Json
from helixd.api.errors import bad_field
from helixd.api.fields import DETOKENIZE_FIELDS, TOKENIZE_FIELDS, Field, refuse_unsupported
from helixd.api.logprobs import shown
from helixd.api.messages import read_messages
from helixd.api.request_body import read_body
from helixd.api.sampling_fields import check_model, check_token_ids
from helixd.api.state import STATE, ApiState


async def tokenize(request: web.Request) -> web.Response:
    """POST /tokenize: `prompt`, or `messages` for a chat template."""
    state = request.app[STATE]
    raw = await read_body(request, state.options)
    return json_answer(await state.threads.run(lambda: _tokenize(_parse(raw, state, TOKENIZE_FIELDS), state)))


async def detokenize(request: web.Request) -> web.Response:
    """POST /detokenize: `tokens`."""
    state = request.app[STATE]
    raw = await read_body(request, state.options)
    return json_answer(await state.threads.run(lambda: _detokenize(_parse(raw, state, DETOKENIZE_FIELDS), state)))


def _parse(raw: bytes, state: ApiState, table: tuple[Field, ...]) -> Fields:
    body: dict[str, Any] = parse_object(raw, state.options.limits.json_depth)
    fields = Fields(body)
    check_model(fields, state.target(), required=False)
    refuse_unsupported(body, table)
    return fields


def _tokenize(fields: Fields, state: ApiState) -> Json:
    prompt = fields.string("prompt")
    chat = fields.raw("messages") is not None
    if (prompt is None) != chat:
        raise bad_field("prompt", "or `messages` must be given, and not both")
    text = prompt
    if text is None:
        messages = read_messages(fields, state.options.limits)
        generation_prompt = fields.boolean("add_generation_prompt", default=True)
        scalars = read_scalars(fields, state.options.template_scalars)
        text = state.text.render_chat(messages, generation_prompt, scalars, state.options.limits.template_bytes)
    # A template writes the special tokens itself.
    special = fields.boolean("add_special_tokens", default=not chat)
    tokenizer = state.text.tokenizer
    ids = tokenizer.encode(text, add_special_tokens=special)
    strings = fields.boolean("return_token_strs")
    return {
        "count": len(ids),
        "max_model_len": state.service.max_context_tokens,
        "tokens": ids,
        "token_strs": [shown(tokenizer.token_bytes(token)) for token in ids] if strings else None,
    }


def _detokenize(fields: Fields, state: ApiState) -> Json:
    tokens = fields.array("tokens")
    if tokens is None:
        raise bad_field("tokens", "is required")
    ids = check_token_ids("tokens", tokens, state.text.ids)
    return {"prompt": state.text.tokenizer.decode(ids, skip_special_tokens=False)}
