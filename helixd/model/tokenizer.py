"""Text to token ids and back, from a checkpoint's `tokenizer.json` (the `tokenizers` library) and its settings.

Decides what is a special token and how ids become text; one implementation serves whole texts and streams, so that
both agree always. Adding bos is the tokenizer's own post-processor's business. Does not know about chat or stops.
Encoding is CPU work without a bound: call it off the event loop for long texts.
"""

import codecs
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Self

import tokenizers

from helixd.errors import ModelError
from helixd.model.files import parse_json_object, read_bytes, read_json_object
from helixd.model.token_bytes import TokenDecoder

_NAMED_SPECIALS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_MAX_CHAR_TOKENS = 4

# The library's own threads: one text gains nothing from them, and a process that has them cannot fork quietly.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


class Tokenizer:
    """Immutable once loaded; may be used from several threads."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        decoder: TokenDecoder,
        specials: Mapping[str, str],
        special_ids: frozenset[int],
    ) -> None:
        self._backend = backend
        self._specials = MappingProxyType(dict(specials))
        self._special_ids = special_ids
        self._bytes: dict[int, bytes] = {}
        self._vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
        self.decoder = decoder

    @classmethod
    def load(cls, model_dir: Path) -> Self:
        """From a model directory. Raises ModelError where there is no usable `tokenizer.json`."""
        where = model_dir / "tokenizer.json"
        text = read_bytes(model_dir, "tokenizer.json")
        if text is None:
            raise ModelError(f"{where} is missing; convert the tokenizer (a tokenizer.model alone is not read)")
        decoder = TokenDecoder.parse(parse_json_object(text, str(where)).get("decoder"))
        try:
            backend = tokenizers.Tokenizer.from_buffer(text)
        except Exception as error:  # the library raises bare Exception for everything it cannot read
            raise ModelError(f"{where} cannot be used: {error}") from error
        backend.no_truncation()
        backend.no_padding()
        settings = read_json_object(model_dir, "tokenizer_config.json") or {}
        special_ids = _declare_added(backend, settings.get("added_tokens_decoder"), where)
        older = read_json_object(model_dir, "special_tokens_map.json") or {}
        specials = {
            name: content
            for name in _NAMED_SPECIALS
            if (content := _content(settings.get(name)) or _content(older.get(name))) is not None
        }
        named = (backend.token_to_id(content) for content in specials.values())
        return cls(backend, decoder, specials, special_ids | {token for token in named if token is not None})

    @property
    def vocab_size(self) -> int:
        """One more than the highest id the tokenizer knows; a model's own vocabulary may be padded beyond it."""
        return self._vocab_size

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """The text of `bos_token`, `eos_token` and their like, where the checkpoint names them."""
        return self._specials

    @property
    def special_ids(self) -> frozenset[int]:
        """The ids that `skip_special_tokens` leaves out."""
        return self._special_ids

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The tokenizer's own end token; a checkpoint's `generation_config.json` may name more (see `Checkpoint`)."""
        return self._named_ids("eos_token")

    @property
    def bos_ids(self) -> tuple[int, ...]:
        """The tokenizer's start token, if it has one."""
        return self._named_ids("bos_token")

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The text's ids. Raises ValueError for text that is no Unicode (lone surrogates)."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the text is not valid Unicode at character {error.start}") from error
        # A batch of one: unlike `encode` it lets other threads, and with them the event loop, run meanwhile.
        return self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of the ids, invalid UTF-8 as U+FFFD. Ids without a token have no text."""
        stream = IncrementalDetokenizer(self, skip_special_tokens=skip_special_tokens)
        return "".join([*map(stream.feed, ids), stream.flush()])

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token adds in the middle of a text, perhaps part of a character; empty for an unknown id."""
        cached = self._bytes.get(token_id)
        if cached is None:
            token = self.token(token_id)
            cached = b"" if token is None else self.decoder.token_bytes(token)
            self._bytes[token_id] = cached
        return cached

    def token(self, token_id: int) -> str | None:
        """The entry as it stands in the vocabulary, None for an id without one."""
        return self._backend.id_to_token(token_id) if 0 <= token_id < 2**32 else None

    def _named_ids(self, name: str) -> tuple[int, ...]:
        token_id = self._backend.token_to_id(self._specials[name]) if name in self._specials else None
        return () if token_id is None else (token_id,)


class IncrementalDetokenizer:
    """Ids in, text out, one at a time with constant work; one per choice.

    `prompt_ids` is what the generated ids follow: with visible prompt text the leading-space rules of a text's start
    do not apply, and a character begun there is completed. The pieces, with `flush`, join to the decoded text.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = (), *, skip_special_tokens: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._first = True
        self._to_strip = tokenizer.decoder.strip_count
        tail: list[int] = []
        for token_id in reversed(prompt_ids):
            if token_id not in self._skipped:
                tail.append(token_id)
                if len(tail) == _MAX_CHAR_TOKENS:
                    break
        if tail:
            self._first, self._to_strip = False, 0
            for token_id in reversed(tail):
                self._utf8.decode(tokenizer.token_bytes(token_id))

    def feed(self, token_id: int) -> str:
        """The text that this id completes; empty while a character is incomplete, and for skipped tokens."""
        if token_id in self._skipped:
            return ""
        if self._first:
            token = self._tokenizer.token(token_id)
            if token is None:
                return ""
            self._first = False
            return self._stripped(self._utf8.decode(self._tokenizer.decoder.token_bytes(token, first=True)))
        return self._stripped(self._utf8.decode(self._tokenizer.token_bytes(token_id)))

    def flush(self) -> str:
        """What was held back: an incomplete character, as U+FFFD. The stream is at its end."""
        return self._stripped(self._utf8.decode(b"", final=True))

    def _stripped(self, text: str) -> str:
        while self._to_strip and text:
            if not text.startswith(self._tokenizer.decoder.strip):
                self._to_strip = 0
                break
            text = text[1:]
            self._to_strip -= 1
        return text


def _declare_added(backend: tokenizers.Tokenizer, listed: object, where: Path) -> frozenset[int]:
    """Ids of the special tokens, after adding those that only `tokenizer_config.json` declares.

    Raises ModelError where the two files give one token different ids.
    """
    known = backend.get_added_tokens_decoder()
    special = {token_id for token_id, token in known.items() if token.special}
    entries = listed.items() if isinstance(listed, dict) else ()
    for key, entry in sorted(entries, key=lambda item: (len(item[0]), item[0])):
        content = _content(entry)
        if content is None or not isinstance(entry, dict) or not (key.isascii() and key.isdigit()):
            raise ModelError(f"tokenizer_config.json: added_tokens_decoder has a bad entry {key!r}: {entry!r}")
        token_id, is_special = int(key), entry.get("special") is True
        if token_id not in known:
            flags = {name: entry.get(name) is True for name in ("single_word", "lstrip", "rstrip", "normalized")}
            backend.add_tokens([tokenizers.AddedToken(content, special=is_special, **flags)])
        if backend.token_to_id(content) != token_id:
            raise ModelError(f"{where} and tokenizer_config.json disagree about the id of {content!r}")
        if is_special:
            special.add(token_id)
    return frozenset(special)


def _content(value: object) -> str | None:
    """The text of a token given as a string or as an object with `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None
