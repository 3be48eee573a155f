"""What every answer of one request shares (`id`, `created`, `model`, `system_fingerprint`), and its usage. Pure."""

import secrets
from dataclasses import dataclass
from typing import Literal

Json = dict[str, object]


@dataclass(frozen=True, slots=True)
class Envelope:
    """Equal on every chunk of a stream. `created` is in seconds since the epoch."""

    id: str
    created: int
    model: str
    system_fingerprint: str

    def wrap(self, kind: str, choices: list[Json]) -> Json:
        """A response or chunk of the object type `kind` around `choices`."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.system_fingerprint,
            "choices": choices,
        }


def new_id(prefix: Literal["chatcmpl", "cmpl"]) -> str:
    """A response id nobody else has."""
    return f"{prefix}-{secrets.token_hex(16)}"


def usage(prompt_tokens: int, completion_tokens: int) -> Json:
    """OpenAI's usage object."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
