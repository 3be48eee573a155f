"""A legacy completions answer's JSON: whole, or as the chunks of a stream. Pure; knows no sockets.

Choice `c` of prompt `p` has the index `p * n + c`. With `echo` a choice's text and log probabilities start with the
prompt's own.
"""

from helixd.api.collect import Collected
from helixd.api.envelope import Envelope, Json, usage
from helixd.api.logprobs import LegacyLogprobs
from helixd.api.prepare import Prepared
from helixd.api.text import Tokenizer
from helixd.coordinator.generation import Delta, Event, Finished, PromptScored
from helixd.sampling import TokenLogprobs

KIND = "text_completion"


class CompletionChunks:
    """The chunks of a streamed completions answer, event by event.

    `generate` is False for `max_tokens` 0: the one token that was drawn all the same is left out and not counted.
    """

    def __init__(
        self, envelope: Envelope, tokenizer: Tokenizer, prepared: Prepared, *, generate: bool, include_usage: bool
    ) -> None:
        self._envelope = envelope
        self._prepared = prepared
        self._generate = generate
        self._include_usage = include_usage
        self._completion_tokens = 0
        first = prepared.requests[0]
        self._n = first.n
        self._wants_logprobs = first.sampling.logprobs is not None
        self._waits_for_scores = first.prompt_logprobs
        self._logprobs = [LegacyLogprobs(tokenizer) for _ in range(self._n * len(prepared.requests))]

    def opening(self) -> list[Json]:
        """Before any event: the echoed prompts, unless their scores have to come first."""
        if self._waits_for_scores:
            return []
        return [chunk for prompt in range(len(self._prepared.echoes)) for chunk in self._echo(prompt, None)]

    def of(self, prompt: int, event: Event) -> list[Json]:
        """The chunks of one event; none for text that is still held back."""
        match event:
            case PromptScored():
                return self._echo(prompt, event.logprobs)
            case Delta() if self._generate and (event.text or (self._wants_logprobs and event.tokens)):
                index = prompt * self._n + event.choice
                for token in event.tokens:
                    self._logprobs[index].add(token.id, token.logprobs)
                return [self._chunk(index, event.text)]
            case Finished():
                self._completion_tokens += event.completion_tokens if self._generate else 0
                reason = event.reason if self._generate else "length"
                return [self._chunk(prompt * self._n + event.choice, "", reason)]
            case _:
                return []

    def closing(self) -> list[Json]:
        """After every choice has finished."""
        if not self._include_usage:
            return []
        totals = usage(self._prepared.prompt_tokens, self._completion_tokens)
        return [{**self._envelope.wrap(KIND, []), "usage": totals}]

    def _echo(self, prompt: int, scores: tuple[TokenLogprobs | None, ...] | None) -> list[Json]:
        chunks = []
        for index in range(prompt * self._n, (prompt + 1) * self._n):
            if scores is not None:
                for token, logprobs in zip(self._prepared.requests[prompt].prompt, scores, strict=True):
                    self._logprobs[index].add(token, logprobs)
            chunks.append(self._chunk(index, self._prepared.echoes[prompt]))
        return chunks

    def _chunk(self, index: int, text: str, finish_reason: str | None = None) -> Json:
        logprobs = self._logprobs[index].take() if self._wants_logprobs and finish_reason is None else None
        choice: Json = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}
        chunk = self._envelope.wrap(KIND, [choice])
        return {**chunk, "usage": None} if self._include_usage else chunk


def completion_body(
    envelope: Envelope, collected: Collected, prepared: Prepared, tokenizer: Tokenizer, *, generate: bool
) -> Json:
    """The whole answer."""
    first = prepared.requests[0]
    choices: list[Json] = []
    for index, choice in enumerate(collected.choices):
        prompt = index // first.n
        block: Json | None = None
        if first.sampling.logprobs is not None:
            block = _block(collected, prepared, index, tokenizer, generate=generate)
        echo = prepared.echoes[prompt] if prepared.echoes else ""
        choices.append(
            {
                "index": index,
                "text": echo + choice.text if generate else echo,
                "logprobs": block,
                "finish_reason": choice.reason if generate else "length",
            }
        )
    totals = usage(prepared.prompt_tokens, collected.completion_tokens if generate else 0)
    return {**envelope.wrap(KIND, choices), "usage": totals}


def _block(collected: Collected, prepared: Prepared, index: int, tokenizer: Tokenizer, *, generate: bool) -> Json:
    prompt = index // prepared.requests[0].n
    legacy = LegacyLogprobs(tokenizer)
    if prompt in collected.scores:
        for token, logprobs in zip(prepared.requests[prompt].prompt, collected.scores[prompt], strict=True):
            legacy.add(token, logprobs)
    if generate:
        for drawn in collected.choices[index].tokens:
            legacy.add(drawn.id, drawn.logprobs)
    return legacy.take()
