"""From a parsed call to generation requests: what is tokenised, and what is refused before all of it is."""

import pytest

from helixd.api.chat_request import parse_chat
from helixd.api.completion_request import parse_completion
from helixd.api.errors import ApiError
from helixd.api.options import ApiOptions
from helixd.api.prepare import HEAD_CHARACTERS_PER_TOKEN, prepare_chat, prepare_completion
from helixd.api.sampling_fields import Target
from helixd.api.text import TextTools
from tests.functional.api_world import ByteTokenizer, LineTemplate

CONTEXT_TOKENS = 10
TARGET = Target("tiny", vocab_size=256, context_tokens=CONTEXT_TOKENS)
OPTIONS = ApiOptions()
HEAD = HEAD_CHARACTERS_PER_TOKEN * CONTEXT_TOKENS


class Counting(ByteTokenizer):
    """Knows how much it was asked to read; a dot is no token."""

    def __init__(self) -> None:
        self.read = 0

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        self.read += len(text)
        return super().encode(text.replace(".", ""))


def prepare(prompt: str, tokenizer: Counting) -> tuple[int, ...]:
    call = parse_completion({"model": "tiny", "prompt": prompt, "max_tokens": 1}, OPTIONS, TARGET)
    return prepare_completion(call, TextTools(tokenizer, None), OPTIONS, TARGET, "cmpl-1", "").requests[0].prompt


def test_a_text_that_is_far_too_long_is_refused_by_its_head() -> None:
    tokenizer = Counting()
    with pytest.raises(ApiError) as caught:
        prepare("x" * 1_000_000, tokenizer)
    assert (caught.value.status, caught.value.code) == (400, "context_length_exceeded")
    assert f"more than {HEAD} for the prompt" in caught.value.message
    assert tokenizer.read == HEAD


def test_a_text_of_few_tokens_is_read_to_its_end_however_long() -> None:
    tokenizer = Counting()
    assert prepare("." * 2 * HEAD + "x" * (CONTEXT_TOKENS - 1), tokenizer) == (ord("x"),) * (CONTEXT_TOKENS - 1)
    with pytest.raises(ApiError) as caught:
        prepare("." * 2 * HEAD + "x" * CONTEXT_TOKENS, tokenizer)
    assert f"needs {CONTEXT_TOKENS} for the prompt" in caught.value.message


class Larger(ByteTokenizer):
    """Knows a token that the model has no embedding for, as tokenizers do that were given more tokens later."""

    vocab_size = 257

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [256 if token == ord("|") else token for token in super().encode(text)]


def test_a_text_with_a_token_that_only_the_tokenizer_has_is_refused() -> None:
    """The model has 256: the last is read, the next is a 400, and nothing that a worker would have to fail at."""
    tools = TextTools(Larger(), LineTemplate(), 256)
    target = Target("tiny", tools.ids, 100)
    for prompt, fine in (("a", True), ("\u00ff", True), ("a|b", False)):
        calls = {
            "prompt": lambda text=prompt: prepare_completion(
                parse_completion({"model": "tiny", "prompt": text}, OPTIONS, target), tools, OPTIONS, target, "c", ""
            ),
            "messages": lambda text=prompt: prepare_chat(
                parse_chat({"model": "tiny", "messages": [{"role": "user", "content": text}]}, OPTIONS, target),
                tools, OPTIONS, target, "c", "",
            ),
        }  # fmt: skip
        for field, call in calls.items():
            if fine:
                assert max(call().requests[0].prompt) < 256
                continue
            with pytest.raises(ApiError) as caught:
                call()
            assert (caught.value.status, caught.value.param) == (400, field)
            assert "token 256" in caught.value.message


@pytest.mark.parametrize(
    ("ids", "max_tokens", "echo"),
    [
        ([104, 0xC3], 1, "h"),
        ([104, 0xF0, 0x9F, 0x98], 1, "h"),
        ([104, 0xC3], 0, "h\ufffd"),
        ([104, 0xC3, 0xA9], 1, "h\u00e9"),
        ([0xC3, 104], 1, "\ufffdh"),
        ([0xFF], 1, "\ufffd"),
        ([*"\ufffd".encode()], 1, "\ufffd"),
    ],
)
def test_a_character_that_the_prompt_begins_is_left_to_the_answer(ids: list[int], max_tokens: int, echo: str) -> None:
    """What is drawn next completes it, or shows that it never will be: echoed as well it would be there twice."""
    body = {"model": "tiny", "prompt": ids, "echo": True, "max_tokens": max_tokens}
    call = parse_completion(body, OPTIONS, TARGET)
    prepared = prepare_completion(call, TextTools(ByteTokenizer(), None), OPTIONS, TARGET, "cmpl-1", "")
    assert prepared.echoes == (echo,)
