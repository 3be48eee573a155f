"""Text to token ids and back: what this room needs of a tokenizer and a chat template, and the threads they run on.

Neither runs on the event loop: a long prompt would hold up every stream. A call has a deadline; its thread cannot be
stopped, so the threads are few and a request that finds them all busy for too long is refused.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, TypeVar

from helixd.api.chat_request import Scalar
from helixd.api.errors import ApiError, bad_field
from helixd.api.messages import Message

T = TypeVar("T")


class Tokenizer(Protocol):
    """`helixd.model.tokenizer.Tokenizer`, as far as it is used here. Thread-safe."""

    @property
    def vocab_size(self) -> int:
        """Token ids are `0 <= id < vocab_size`."""
        ...

    @property
    def special_ids(self) -> frozenset[int]:
        """The tokens that have no text in an answer."""
        ...

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The text's token ids."""
        ...

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The ids' text."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token stands for; they may be part of a character."""
        ...


class ChatTemplate(Protocol):
    """`helixd.model.chat.ChatTemplate`, as far as it is used here. Thread-safe."""

    def render(self, messages: list[Message], add_generation_prompt: bool = True, **scalars: Scalar) -> str:
        """The prompt's text, special tokens included. Raises ValueError for messages the template does not take."""
        ...


@dataclass(frozen=True, slots=True)
class TextTools:
    """The served model's tokenizer, its chat template if it has one, and its vocabulary's size.

    `vocab_size`: 0 for the tokenizer's own; else the token ids that clients may name are below both.
    """

    tokenizer: Tokenizer
    chat: ChatTemplate | None
    vocab_size: int = 0

    @property
    def ids(self) -> int:
        """Token ids are `0 <= id < ids`."""
        return min(self.vocab_size or self.tokenizer.vocab_size, self.tokenizer.vocab_size)

    def render_chat(
        self, messages: list[Message], add_generation_prompt: bool, scalars: Mapping[str, Scalar], max_bytes: int
    ) -> str:
        """The prompt's text. Raises a 400 where the model's template does not take the messages."""
        if self.chat is None:
            raise ApiError(
                400, "The served model has no chat template; use /v1/completions.", param="messages", code="no_template"
            )
        try:
            text = self.chat.render(messages, add_generation_prompt=add_generation_prompt, **scalars)
        except ValueError as error:
            raise bad_field("messages", f"do not fit the model's chat template: {error}") from error
        if len(text) > max_bytes:
            raise bad_field("messages", f"render to more than {max_bytes} characters")
        return text


class TextThreads:
    """Runs text work on a few threads, each call with a deadline. Close it when the API stops."""

    def __init__(self, threads: int, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._executor = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="helixd-api-text")

    async def run(self, work: Callable[[], T]) -> T:
        """`work()` on a thread. Raises a 504 when it takes too long, waiting for a thread included."""
        try:
            async with asyncio.timeout(self._timeout_s):
                return await asyncio.get_running_loop().run_in_executor(self._executor, work)
        except TimeoutError:
            raise ApiError(
                504, f"Reading and tokenising the request took more than {self._timeout_s:g} s.", code="timeout"
            ) from None

    def close(self) -> None:
        """Stop taking work; what runs is left to end by itself."""
        self._executor.shutdown(wait=False, cancel_futures=True)
