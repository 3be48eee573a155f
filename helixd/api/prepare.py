"""A parsed call to generation requests: rendered, tokenised, and checked against the context. Runs on a thread."""

import codecs
from dataclasses import dataclass, replace

from helixd.api.chat_request import ChatCall
from helixd.api.completion_request import CompletionCall
from helixd.api.errors import bad_field, context_too_long
from helixd.api.options import ApiOptions
from helixd.api.sampling_fields import CommonFields, Target, draw_seed
from helixd.api.text import TextTools, Tokenizer
from helixd.coordinator.generation import GenerationRequest
from helixd.ids import RequestId

HEAD_CHARACTERS_PER_TOKEN = 32
HEAD_TOO_LONG = 1.25
"""A text whose head of 32 characters per token of context is 1.25 contexts long is too long: the rest is not read."""
MAX_CHARACTER_TOKENS = 4


@dataclass(frozen=True, slots=True)
class Prepared:
    """What goes to the coordinator for one HTTP request, one entry per prompt. `echoes`: each prompt's own text."""

    response_id: str
    requests: tuple[GenerationRequest, ...]
    echoes: tuple[str, ...] = ()

    @property
    def prompt_tokens(self) -> int:
        """Each prompt counts once, whatever `n` is."""
        return sum(len(request.prompt) for request in self.requests)


def prepare_chat(
    call: ChatCall, text: TextTools, options: ApiOptions, target: Target, response_id: str, client: str
) -> Prepared:
    """The one generation of a chat call. Raises a 400 for messages that do not fit template or context."""
    rendered = text.render_chat(call.messages, call.add_generation_prompt, call.scalars, options.limits.template_bytes)
    # The template writes the special tokens itself.
    prompt = _encode("messages", rendered, False, call.max_tokens, text, target)
    _check_length("messages", prompt, call.max_tokens, target)
    request = _request(response_id, prompt, call.max_tokens, call.common, options, client)
    return Prepared(response_id, (request,))


def prepare_completion(
    call: CompletionCall, text: TextTools, options: ApiOptions, target: Target, response_id: str, client: str
) -> Prepared:
    """One generation per prompt of a completions call. Raises a 400 for a prompt that does not fit the context."""
    requests: list[GenerationRequest] = []
    echoes: list[str] = []
    # With `max_tokens` 0 one token is drawn and left out of the answer: a generation has at least one.
    max_tokens = max(call.max_tokens, 1)
    for index, given in enumerate(call.prompts):
        if isinstance(given, str):
            prompt = _encode("prompt", given, call.add_special_tokens, max_tokens, text, target)
        else:
            prompt = given
        _check_length("prompt", prompt, max_tokens, target)
        if call.echo:
            echoes.append(given if isinstance(given, str) else _echo(prompt, call.max_tokens > 0, text.tokenizer))
        common = call.common
        if index and not common.seeded:
            common = replace(common, sampling=replace(common.sampling, seed=draw_seed()))
        request_id = response_id if len(call.prompts) == 1 else f"{response_id}-{index}"
        request = _request(request_id, prompt, max_tokens, common, options, client)
        requests.append(replace(request, prompt_logprobs=call.echo and common.sampling.logprobs is not None))
    return Prepared(response_id, tuple(requests), tuple(echoes))


def _echo(prompt: tuple[int, ...], goes_on: bool, tokenizer: Tokenizer) -> str:
    """The text of a prompt of ids. A character that it only begins is the answer's to complete, where there is one."""
    text = tokenizer.decode(prompt)
    if not goes_on:
        return text
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in [token for token in prompt if token not in tokenizer.special_ids][-MAX_CHARACTER_TOKENS:]:
        decoder.decode(tokenizer.token_bytes(token))
    begun, _ = decoder.getstate()
    return text[:-1] if begun else text


def _encode(
    param: str, given: str, special: bool, max_tokens: int | None, text: TextTools, target: Target
) -> tuple[int, ...]:  # fmt: skip
    head = HEAD_CHARACTERS_PER_TOKEN * target.context_tokens
    if len(given) > head:
        counted = len(text.tokenizer.encode(given[:head], add_special_tokens=False))
        if counted > HEAD_TOO_LONG * target.context_tokens:
            raise context_too_long(param, counted, max_tokens, target.context_tokens, or_more=True)
    tokens = tuple(text.tokenizer.encode(given, add_special_tokens=special))
    # A tokenizer may have been given more tokens than its model has.
    if (highest := max(tokens, default=0)) >= target.vocab_size:
        raise bad_field(
            param,
            f"holds token {highest}, which only the tokenizer knows: the model has none above {target.vocab_size - 1}",
        )
    return tokens


def _check_length(param: str, prompt: tuple[int, ...], max_tokens: int | None, target: Target) -> None:
    if not prompt:
        raise bad_field(param, "must not be empty: it has no tokens")
    if len(prompt) + (max_tokens or 1) > target.context_tokens:
        raise context_too_long(param, len(prompt), max_tokens, target.context_tokens)


def _request(
    request_id: str, prompt: tuple[int, ...], max_tokens: int | None, common: CommonFields, options: ApiOptions,
    client: str,
) -> GenerationRequest:  # fmt: skip
    return GenerationRequest(
        request_id=RequestId(request_id),
        prompt=prompt,
        n=common.n,
        max_tokens=max_tokens,
        sampling=common.sampling,
        stop=common.stop,
        stop_token_ids=common.stop_token_ids,
        ignore_eos=common.ignore_eos,
        deadline_s=options.request_timeout_s,
        client=client,
    )
