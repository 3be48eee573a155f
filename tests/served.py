"""A tiny checkpoint that can be served over HTTP, and what `transformers` says its answers are."""

import functools
from collections.abc import Sequence
from pathlib import Path

import jinja2
import torch
import transformers

from tests.daemons import TEMPLATE, add_tokenizer, byte_tokenizer
from tests.families import VOCAB, Reference, exact_checkpoint, reference

NEW = 48
PROMPTS = ["def main():", "import os, sys", "once upon a time there was a small model", "x"]
SEED = 1
"""The first seed that gives clear answers; another one is found should it ever not."""
torch.set_num_threads(1)
_TOKENIZER = byte_tokenizer(VOCAB)


def chat_text(content: str) -> str:
    """What the chat template makes of one user message."""
    return f"user: {content}\nassistant:"


def served_checkpoint(path: Path, new: int = NEW) -> Path:
    """A checkpoint whose greedy answers to PROMPTS, plain and as chat, cannot depend on the order of sums."""
    assert chat_text("x") == jinja2.Template(TEMPLATE).render(messages=[{"role": "user", "content": "x"}])
    texts = [*PROMPTS, *map(chat_text, PROMPTS[:3])]
    exact_checkpoint("llama2", path, [encode(text) for text in texts], new, SEED)
    add_tokenizer(path)
    return path


def encode(text: str) -> list[int]:
    return list(_TOKENIZER.encode(text).ids)


class Say:
    """The oracle for one checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def reference(self, prompt: str, n: int) -> Reference:
        return reference(self.path, tuple(encode(prompt)), n)

    def text(self, prompt: str, n: int) -> str:
        return self.decode(self.reference(prompt, n).tokens)

    def decode(self, tokens: Sequence[int]) -> str:
        return str(_TOKENIZER.decode(list(tokens)))

    def token_bytes(self, token: int) -> bytes:
        """Each entry of the byte alphabet stands for one byte."""
        letter = _TOKENIZER.id_to_token(token)
        return bytes([_byte_of()[letter]])

    def prompt_logprobs(self, prompt: str) -> torch.Tensor:
        """Log probabilities of the prompt's tokens from the second on."""
        model = transformers.AutoModelForCausalLM.from_pretrained(self.path, dtype=torch.float32).eval()
        ids = torch.tensor([encode(prompt)])
        with torch.inference_mode():
            table = torch.log_softmax(model(ids).logits[0, :-1].float(), -1)
        return table.gather(-1, ids[0, 1:, None])[:, 0]


@functools.cache
def _byte_of() -> dict[str, int]:
    """GPT-2's letters for bytes: printable ones stand for themselves, the others follow from U+0100 on, in order."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + at): byte for at, byte in enumerate(others)}
