"""A chat answer's JSON: whole, or as the chunks of a stream. Pure; knows no sockets."""

from helixd.api.collect import Collected
from helixd.api.envelope import Envelope, Json, usage
from helixd.api.logprobs import chat_logprobs
from helixd.api.text import Tokenizer
from helixd.coordinator.generation import Delta, Event, Finished

WHOLE, CHUNK = "chat.completion", "chat.completion.chunk"


def chat_body(
    envelope: Envelope, collected: Collected, prompt_tokens: int, tokenizer: Tokenizer, *, logprobs: bool
) -> Json:
    """The whole answer."""
    choices: list[Json] = [
        {
            "index": index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": chat_logprobs(tuple(choice.tokens), tokenizer) if logprobs else None,
            "finish_reason": choice.reason,
        }
        for index, choice in enumerate(collected.choices)
    ]
    return {**envelope.wrap(WHOLE, choices), "usage": usage(prompt_tokens, collected.completion_tokens)}


class ChatChunks:
    """The chunks of a streamed chat answer, event by event.

    The role of each choice comes first, then text, then a chunk with `finish_reason` and an empty delta. With
    `include_usage` a last chunk without choices carries the usage, and all others carry `usage: null`.
    """

    def __init__(
        self, envelope: Envelope, tokenizer: Tokenizer, *, n: int, prompt_tokens: int, logprobs: bool,
        include_usage: bool,
    ) -> None:  # fmt: skip
        self._envelope = envelope
        self._tokenizer = tokenizer
        self._n = n
        self._prompt_tokens = prompt_tokens
        self._logprobs = logprobs
        self._include_usage = include_usage
        self._completion_tokens = 0

    def opening(self) -> list[Json]:
        """Before any event."""
        return [self._chunk(index, {"role": "assistant", "content": ""}) for index in range(self._n)]

    def of(self, prompt: int, event: Event) -> list[Json]:
        """The chunks of one event; none for text that is still held back."""
        match event:
            case Delta() if event.text or (self._logprobs and event.tokens):
                logprobs = chat_logprobs(event.tokens, self._tokenizer) if self._logprobs else None
                return [self._chunk(event.choice, {"content": event.text}, logprobs=logprobs)]
            case Finished():
                self._completion_tokens += event.completion_tokens
                return [self._chunk(event.choice, {}, finish_reason=event.reason)]
            case _:
                return []

    def closing(self) -> list[Json]:
        """After every choice has finished."""
        if not self._include_usage:
            return []
        return [{**self._envelope.wrap(CHUNK, []), "usage": usage(self._prompt_tokens, self._completion_tokens)}]

    def _chunk(
        self, index: int, delta: Json, *, logprobs: Json | None = None, finish_reason: str | None = None
    ) -> Json:
        choice: Json = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        chunk = self._envelope.wrap(CHUNK, [choice])
        return {**chunk, "usage": None} if self._include_usage else chunk
