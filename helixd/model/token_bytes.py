"""From a vocabulary entry to the bytes it stands for, as the `decoder` of a `tokenizer.json` says.

Understands byte-level BPE (`ByteLevel`) and sentencepiece-like vocabularies (`Metaspace`, or `Replace` with
`ByteFallback`, `Fuse` and `Strip`), each token on its own, so that text can be streamed with constant work per token.
A decoder that cannot be taken apart like this is refused by name. Knows nothing about ids.
"""

import re
from dataclasses import dataclass
from typing import Self

from helixd.errors import ModelError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SUPPORTED = "ByteLevel, Metaspace, or a Sequence of Replace, ByteFallback, Fuse and Strip (at the start, after Fuse)"


def _byte_level_alphabet() -> dict[str, int]:
    """Printable latin-1 stands for itself, the other bytes for U+0100 on (GPT-2's byte-level alphabet)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_LEVEL = _byte_level_alphabet()


@dataclass(frozen=True, slots=True)
class TokenDecoder:
    """How tokens become bytes, and what is dropped at the very start of a text.

    `first_drops`: a character left out of the first token (Metaspace). `strip` and `strip_count`: so many of that
    character are left out at the start of the text (Strip).
    """

    byte_level: bool = False
    byte_fallback: bool = False
    replacements: tuple[tuple[str, str], ...] = ()
    first_drops: str = ""
    strip: str = ""
    strip_count: int = 0

    @classmethod
    def parse(cls, decoder: object) -> Self:
        """From the `decoder` entry of `tokenizer.json`. Raises ModelError naming a decoder that is not supported."""
        steps = (
            decoder.get("decoders") if isinstance(decoder, dict) and decoder.get("type") == "Sequence" else [decoder]
        )
        if not isinstance(steps, list) or not steps:
            raise _unsupported(decoder)
        byte_level = byte_fallback = fused = False
        replacements: list[tuple[str, str]] = []
        first_drops, strip, strip_count = "", "", 0
        for step in steps:
            kind = step.get("type") if isinstance(step, dict) else None
            if strip or byte_level:
                raise _unsupported(step)
            if kind == "ByteLevel" and len(steps) == 1:
                byte_level = True
            elif kind == "ByteFallback" and not fused:
                byte_fallback = True
            elif kind == "Fuse":
                fused = True
            elif kind == "Replace" and not (fused or byte_fallback):
                replacements.append(_replacement(step))
            elif kind == "Metaspace" and len(steps) == 1:
                mark = _text(step, "replacement")
                replacements.append((mark, " "))
                old_style = step.get("prepend_scheme") is None and step.get("add_prefix_space", True)
                if old_style or step.get("prepend_scheme") in ("always", "first"):
                    first_drops = mark
            elif kind == "Strip" and fused and step.get("stop") == 0 and isinstance(step.get("start"), int):
                strip, strip_count = _text(step, "content"), step["start"]
            else:
                raise _unsupported(step)
        return cls(byte_level, byte_fallback, tuple(replacements), first_drops, strip, strip_count)

    def token_bytes(self, token: str, *, first: bool = False) -> bytes:
        """The bytes of a token as it stands in the vocabulary. `first`: it opens the text."""
        if self.byte_level:
            try:
                return bytes([_BYTE_LEVEL[char] for char in token])
            except KeyError:
                return token.encode()
        if first and self.first_drops:
            token = token.replace(self.first_drops, "")
        for pattern, content in self.replacements:
            token = token.replace(pattern, content)
        if self.byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        return token.encode()


def _replacement(step: dict[str, object]) -> tuple[str, str]:
    pattern, content = step.get("pattern"), step.get("content")
    text = pattern.get("String") if isinstance(pattern, dict) else None
    if not isinstance(text, str) or not text or not isinstance(content, str):
        raise _unsupported(step)
    return text, content


def _text(step: dict[str, object], key: str) -> str:
    value = step.get(key)
    if not isinstance(value, str) or len(value) != 1:
        raise _unsupported(step)
    return value


def _unsupported(step: object) -> ModelError:
    return ModelError(f"tokenizer.json: decoder {step!r} is not supported; supported: {_SUPPORTED}")
