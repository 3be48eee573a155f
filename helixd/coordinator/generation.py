"""The seam between `api` and `coordinator`: what a validated request asks for, and the events it gets back.

A `GenerationRequest` is one prompt with `n` choices. The coordinator owns its truth from `submit` on; the api only
formats events. Text is already detokenised: deltas never split a UTF-8 character and never contain a stop string.
"""

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from helixd.errors import HelixError
from helixd.ids import RequestId
from helixd.sampling import SamplingParams, TokenLogprobs

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt, `n` choices (choice index c samples with `(seed, c, position)`).

    `max_tokens`: None for as many as the context allows. `stop`: strings that end a choice and are not part of its
    text. `stop_token_ids` end it likewise. `ignore_eos` goes on past the model's end tokens. `prompt_logprobs`: also
    report the prompt's own log probabilities (legacy `echo` with `logprobs`), with as many alternatives as
    `sampling.logprobs`. `client` is whom limits are counted for (a key's digest or "").
    """

    request_id: RequestId
    prompt: tuple[int, ...]
    n: int
    max_tokens: int | None
    sampling: SamplingParams
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    prompt_logprobs: bool = False
    deadline_s: float | None = None
    client: str = ""


@dataclass(frozen=True, slots=True)
class TokenText:
    """One emitted token: its id, the bytes it stands for, its log probabilities if asked for."""

    id: int
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True, slots=True)
class PromptScored:
    """The prompt's log probabilities, one entry per prompt token (None for the first). Comes before any Delta."""

    logprobs: tuple[TokenLogprobs | None, ...]


@dataclass(frozen=True, slots=True)
class Delta:
    """New text of a choice, and the tokens that completed it (text may lag: a token can end inside a character)."""

    choice: int
    text: str
    tokens: tuple[TokenText, ...]


@dataclass(frozen=True, slots=True)
class Finished:
    """A choice ended well. `completion_tokens` counts each emitted token once, however often it was recomputed."""

    choice: int
    reason: FinishReason
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Failed:
    """The request ended with an error after it was admitted (`code` such as `pipeline_lost`, `timeout`)."""

    code: str
    message: str


Event = PromptScored | Delta | Finished | Failed


class Refused(HelixError):
    """The request was not admitted. `status` is the HTTP status to answer with, `code` OpenAI's error code."""

    def __init__(
        self, status: int, code: str | None, message: str, *, param: str | None = None,
        retry_after_s: float | None = None, permanent: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s
        self.permanent = permanent


class Generation(Protocol):
    """An admitted request. Iterate it once; leaving early without `cancel` is a bug of the caller."""

    @property
    def route(self) -> tuple[str, ...]:
        """The route of the first choice's current attempt, as `node[entry,end)` strings, for people."""
        ...

    @property
    def retries(self) -> int:
        """How many times a choice of this request moved to another route so far."""
        ...

    def events(self) -> AsyncIterator[Event]:
        """Events in order; ends after every choice Finished, or after one Failed."""
        ...

    async def cancel(self) -> None:
        """The client is gone: free everything on every hop. Idempotent; safe after the end."""
        ...


@dataclass(frozen=True, slots=True)
class Readiness:
    """Whether requests can be served now and, if not, why (`code` as in Refused, `detail` for people and machines)."""

    ready: bool
    code: str | None
    message: str
    detail: Mapping[str, object]


class Service(Protocol):
    """What the coordinator offers to `api`."""

    @property
    def model_name(self) -> str:
        """The served model's name."""
        ...

    @property
    def max_context_tokens(self) -> int:
        """Prompt and output together, at most."""
        ...

    def readiness(self) -> Readiness:
        """Whether a complete pipeline exists and the daemon is not draining."""
        ...

    async def submit(self, request: GenerationRequest) -> Generation:
        """Admit the request (waiting in the bounded queue if need be). Raises Refused."""
        ...

    def cluster_view(self) -> Mapping[str, object]:
        """What `/cluster` shows: nodes, ranges, links, epoch, per-node load, who confirmed what. JSON-able."""
        ...
