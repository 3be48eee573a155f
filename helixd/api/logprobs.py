"""Log probabilities in OpenAI's two formats. Pure.

A token that is not whole UTF-8 by itself shows its bytes as `\\xNN` escapes, as OpenAI does; `bytes` has the truth.
Minus infinity is not JSON: -9999.0 stands for it, as OpenAI's description says.
"""

import codecs

from helixd.api.text import Tokenizer
from helixd.coordinator.generation import TokenText
from helixd.sampling import TokenLogprobs

LOWEST = -9999.0


def finite(logprob: float) -> float:
    """The log probability, or -9999.0 for one that JSON cannot hold."""
    return logprob if logprob > LOWEST else LOWEST


def shown(raw: bytes, prefix: str = "") -> str:
    """A token's bytes as text; as escapes after `prefix` where they are not whole characters."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return prefix + "".join(f"\\x{byte:02x}" for byte in raw)


def chat_logprobs(tokens: tuple[TokenText, ...], tokenizer: Tokenizer) -> dict[str, object]:
    """The chat format: `{"content": [...], "refusal": null}`, one entry per token that has log probabilities."""
    content = []
    for token in tokens:
        if token.logprobs is None:
            continue
        entry = _chat_entry(token.id, token.logprobs.logprob, tokenizer)
        entry["top_logprobs"] = [_chat_entry(other, logprob, tokenizer) for other, logprob in token.logprobs.top]
        content.append(entry)
    return {"content": content, "refusal": None}


def _chat_entry(token: int, logprob: float, tokenizer: Tokenizer) -> dict[str, object]:
    raw = tokenizer.token_bytes(token)
    return {"token": shown(raw), "logprob": finite(logprob), "bytes": list(raw)}


class LegacyLogprobs:
    """The completions format of one choice, built as tokens come; `text_offset` counts characters of its text.

    The first prompt token has no log probability: null, as OpenAI's API answers (its schema says number).
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._offset = 0
        self._clear()

    def _clear(self) -> None:
        self._tokens: list[str] = []
        self._logprobs: list[float | None] = []
        self._top: list[dict[str, float] | None] = []
        self._offsets: list[int] = []

    def add(self, token: int, logprobs: TokenLogprobs | None) -> None:
        """One more token of the choice, in order."""
        raw = self._tokenizer.token_bytes(token)
        self._tokens.append(shown(raw, "bytes:"))
        self._offsets.append(self._offset)
        if token not in self._tokenizer.special_ids:
            self._offset += len(self._decoder.decode(raw))
        if logprobs is None:
            self._logprobs.append(None)
            self._top.append(None)
            return
        self._logprobs.append(finite(logprobs.logprob))
        # The chosen token is listed even where it is not among the best.
        top = {shown(self._tokenizer.token_bytes(other), "bytes:"): finite(value) for other, value in logprobs.top}
        self._top.append({**top, self._tokens[-1]: finite(logprobs.logprob)})

    def take(self) -> dict[str, object]:
        """What came since the last call, as the API shows it."""
        block: dict[str, object] = {
            "tokens": self._tokens,
            "token_logprobs": self._logprobs,
            "top_logprobs": self._top,
            "text_offset": self._offsets,
        }
        self._clear()
        return block
