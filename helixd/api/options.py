"""What an operator may set about the HTTP surface, and the limits a request is held to.

Every limit has a default that is safe on an open network; what happens beyond it is said beside it. The daemon's
configuration decides the values; nothing in this room reads files or the environment to find them.
"""

from dataclasses import dataclass, field

from helixd import __version__
from helixd.model.chat import TEMPLATE_ARGUMENTS

MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Limits:
    """What one request body may hold. Beyond any of them the answer is a 400 that names the field."""

    n: int = 8
    prompts: int = 128
    messages: int = 1024
    stop: int = 4
    stop_bytes: int = 256
    stop_token_ids: int = 64
    logit_bias: int = 300
    top_logprobs: int = 20
    json_depth: int = 64
    template_bytes: int = 8 * MIB


@dataclass(frozen=True, slots=True)
class ApiOptions:
    """How the HTTP surface behaves.

    `key_digests`: SHA-256 of each accepted key; empty means that the API is open. `cors_origins`: origins whose
    pages may call the API (`*` for all); empty switches CORS off. `body_bytes`: a larger body is a 413.
    `body_timeout_s`: a body that takes longer to arrive is a 408. `headers_timeout_s`: a connection whose first
    request is not complete by then is closed. `connections`: one more is answered 503 and closed.
    `per_key_in_flight`: one more generation of the same key is a 429; open APIs have no such limit.
    `request_timeout_s`: given to the coordinator as the request's deadline. `text_timeout_s`: for rendering and
    tokenising one request, on one of `text_threads` threads. `keep_alive_s`: a stream silent for so long gets a
    comment. `write_stall_s`: a reader that takes nothing for so long is cut off. `output_chunks`: chunks waiting for
    a slow reader; beyond it new text joins the choice's last waiting chunk. `template_scalars`: names a client may
    set through `chat_template_kwargs`. `vllm_metric_names`: also publish vLLM's names for the same figures.
    """

    limits: Limits = field(default_factory=Limits)
    key_digests: frozenset[bytes] = frozenset()
    cors_origins: tuple[str, ...] = ()
    body_bytes: int = 4 * MIB
    body_timeout_s: float = 30.0
    headers_timeout_s: float = 10.0
    header_line_bytes: int = 8190
    header_lines: int = 128
    keepalive_timeout_s: float = 75.0
    shutdown_timeout_s: float = 5.0
    connections: int = 1024
    per_key_in_flight: int = 64
    request_timeout_s: float = 600.0
    text_timeout_s: float = 5.0
    text_threads: int = 2
    keep_alive_s: float = 10.0
    write_stall_s: float = 30.0
    output_chunks: int = 256
    template_scalars: frozenset[str] = TEMPLATE_ARGUMENTS
    vllm_metric_names: bool = True
    system_fingerprint: str = f"helixd-{__version__}"
