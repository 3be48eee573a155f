"""From token ids to a choice's text: detokenise, hold back what may be a stop string, decide when it ends.

The one owner of a choice's emitted ids. Knows nothing of routes, attempts or sockets: a token recomputed elsewhere must
not be fed twice, which its owner sees to.
"""

from collections.abc import Collection
from typing import Protocol

from helixd.coordinator.generation import Delta, FinishReason, TokenText
from helixd.model.stop import StopMatcher
from helixd.sampling import TokenLogprobs


class Detokenizer(Protocol):
    """Turns ids into text one at a time; never splits a character."""

    def feed(self, token_id: int) -> str:
        """The text that this id completes."""
        ...

    def flush(self) -> str:
        """What is left at the end (an unfinished character becomes U+FFFD)."""
        ...


class ChoiceText:
    """The growing answer of one choice."""

    def __init__(
        self, choice: int, max_tokens: int, end_ids: Collection[int], stops: tuple[str, ...], detokenizer: Detokenizer
    ) -> None:
        self.ids: list[int] = []
        self.finished: FinishReason | None = None
        self._choice = choice
        self._max_tokens = max_tokens
        self._end_ids = frozenset(end_ids)
        self._stops = StopMatcher(stops)
        self._detokenizer = detokenizer
        self._unsent: list[TokenText] = []

    def accept(self, token: int, logprobs: TokenLogprobs | None) -> Delta | None:
        """Take the next token; returns what can be sent now. Sets `finished` when the choice is over."""
        assert self.finished is None
        self.ids.append(token)
        self._unsent.append(TokenText(token, logprobs))
        ended = token in self._end_ids
        text, stopped = ("", False) if ended else self._stops.feed(self._detokenizer.feed(token))
        if stopped or ended:
            self.finished = "stop"
        elif len(self.ids) >= self._max_tokens:
            self.finished = "length"
        if self.finished is not None and not stopped:
            text += self._rest()
        if not text and self.finished is None:
            return None
        delta = Delta(self._choice, text, tuple(self._unsent))
        self._unsent = []
        return delta

    def _rest(self) -> str:
        """What was held back, now that no more text comes."""
        text, stopped = self._stops.feed(self._detokenizer.flush())
        if stopped:
            self.finished = "stop"
            return text
        return text + self._stops.flush()
