"""The events of a request's generations gathered into finished choices, for an answer that is not streamed. Pure."""

from dataclasses import dataclass, field

from helixd.coordinator.generation import Delta, Event, Failed, Finished, FinishReason, PromptScored, TokenText
from helixd.sampling import TokenLogprobs


@dataclass(slots=True)
class Choice:
    """One choice as far as it has come."""

    parts: list[str] = field(default_factory=list)
    tokens: list[TokenText] = field(default_factory=list)
    reason: FinishReason = "stop"
    completion_tokens: int = 0

    @property
    def text(self) -> str:
        """The choice's text so far."""
        return "".join(self.parts)


class Collected:
    """Choices in order `prompt * n + choice`, and each prompt's scores where they were asked for."""

    def __init__(self, prompts: int, n: int) -> None:
        self._n = n
        self.choices = [Choice() for _ in range(prompts * n)]
        self.scores: dict[int, tuple[TokenLogprobs | None, ...]] = {}

    def add(self, prompt: int, event: Event) -> None:
        """Take in one event of the generation of prompt number `prompt`; failures are somebody else's."""
        match event:
            case PromptScored():
                self.scores[prompt] = event.logprobs
            case Delta():
                choice = self.choices[prompt * self._n + event.choice]
                choice.parts.append(event.text)
                choice.tokens.extend(event.tokens)
            case Finished():
                choice = self.choices[prompt * self._n + event.choice]
                choice.reason = event.reason
                choice.completion_tokens = event.completion_tokens
            case Failed():
                pass

    @property
    def completion_tokens(self) -> int:
        """Over all choices."""
        return sum(choice.completion_tokens for choice in self.choices)
