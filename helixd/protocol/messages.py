"""The messages that coordinator and workers exchange, and who sends which.

Each is a frozen struct with a `KIND`; on the wire it is the list of its fields (later versions append fields with
defaults, so that version N reads N-1). Ranges are half-open `(start, end)` pairs. Times are durations, never clocks.

Identity: a data message names the coordinator's `incarnation`, the `epoch`, and for each sequence `attempt` and
`step`. `step` is the index, in prompt + output, of the token this pass is meant to draw; a pass's chunk is named by its
first position. Whoever receives a stale identity drops the message and counts it.
"""

from typing import Annotated, ClassVar, Literal

import msgspec

from helixd.sampling import SamplingParams

Name = Annotated[str, msgspec.Meta(max_length=256)]
Text = Annotated[str, msgspec.Meta(max_length=1000)]
Count = Annotated[int, msgspec.Meta(ge=0)]
# The bounds also keep out NaN and infinity, with which nothing can be planned.
Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e9)]
Rate = Annotated[float, msgspec.Meta(ge=0, le=1e18)]
# Nor can a plan be made with numbers that only look like measurements: their ratios overflow.
Point = tuple[Annotated[float, msgspec.Meta(ge=1e-3, le=1e9)], Annotated[float, msgspec.Meta(ge=1e-12, le=1e6)]]
Points = Annotated[list[Point], msgspec.Meta(min_length=1, max_length=256)]
Slowdown = Annotated[float, msgspec.Meta(ge=0, le=1e6)]
"""Times of steps over those measured before any placement; 0: not known."""
NodeState = Literal["loading", "ready", "failed"]


_TEXT_BYTES = 1000


def brief(text: str) -> str:
    """As much of `text` as a `Text` carries, on the wire too, where bytes count; what is no Unicode becomes `?`."""
    return text.encode(errors="replace")[:_TEXT_BYTES].decode(errors="ignore")


class Message(msgspec.Struct, frozen=True, array_like=True):
    """Base of all messages."""

    KIND: ClassVar[int] = 0


class NodeHardware(msgspec.Struct, frozen=True, array_like=True):
    """A device that a worker offers. `memory_budget_bytes` is for weights and KV together."""

    node: Name
    device: Name
    device_name: Name
    memory_total_bytes: Count
    memory_budget_bytes: Count


class Hello(Message, frozen=True):
    """Worker -> coordinator, first message on a link: who I am and what I offer.

    `fingerprint` is that of a local copy of the model ("" without one: weights are then fetched from the coordinator).
    `port` is where other workers can dial; `advertise` the host to use ("" for the address the coordinator sees).
    `held` tells the layers that are already loaded, per node, of the model `held_fingerprint` (`Welcome.data`). `name`
    is for people.
    `protocol` is the newest version that I speak, `oldest` the oldest (0: the same). Payload: the digests of the local
    copy's tensors (`helixd.model.digests`); none from version 1.
    """

    KIND: ClassVar[int] = 1
    protocol: int
    nodes: list[NodeHardware]
    fingerprint: Name
    advertise: Name
    port: Annotated[int, msgspec.Meta(ge=0, le=65535)]
    software: Name
    held_fingerprint: Name = ""
    held: list[tuple[Name, int, int]] = []
    name: Name = ""
    oldest: Count = 0


class Welcome(Message, frozen=True):
    """Coordinator -> worker: you are in; this is the model and how it is computed. Payload: its config.json.

    `protocol` is the version that both speak from here on; version 1 does not say so. `weights` tells other data apart
    that has the same names, shapes and tokenizer ("": not known): what was fetched or loaded under another one is not
    this model's.
    """

    KIND: ClassVar[int] = 2
    model_name: Name
    fingerprint: Name
    dtype: Name
    max_context_tokens: Count
    max_batch_sequences: Count
    max_batch_tokens: Count
    prefill_chunk_tokens: Count
    protocol: Count = 1
    weights: Name = ""

    @property
    def data(self) -> str:
        """What tells this model, data included, from every other."""
        return f"{self.fingerprint}-{self.weights}" if self.weights else self.fingerprint


class Refused(Message, frozen=True):
    """Coordinator -> worker: you are not in. `final`: coming back unchanged is useless."""

    KIND: ClassVar[int] = 3
    code: Name
    message: Text
    final: bool


class Measured(Message, frozen=True):
    """Worker -> coordinator: what a node's device does. Points are `(tokens, s)` per layer, decode counts sequences.

    Their batch sizes rise.
    """

    KIND: ClassVar[int] = 4
    node: Name
    prompt_layer_time_s: Points
    decode_layer_time_s: Points


class Probe(Message, frozen=True):
    """Coordinator -> worker: dial that peer if need be, measure the link to it, keep it only if an epoch needs it."""

    KIND: ClassVar[int] = 5
    peer: Name
    host: Name
    port: int
    max_bytes: Count


class Probed(Message, frozen=True):
    """Worker -> coordinator: the answer to `Probe`; `error` is "" when it worked, the numbers are 0 when not."""

    KIND: ClassVar[int] = 6
    peer: Name
    rtt_s: Seconds
    bandwidth_bytes_per_s: Rate
    error: Text


class Assignment(msgspec.Struct, frozen=True, array_like=True):
    """What one node holds in an epoch.

    `next_hops` are its schedule: `(node, tokens/s)`, "" for the coordinator. Only the node's own worker is told them.
    """

    node: Name
    peer: Name
    start: int
    end: int
    kv_token_layers: Count
    next_hops: list[tuple[Name, float]]


class PeerAddress(msgspec.Struct, frozen=True, array_like=True):
    """A neighbour in the plan. `dial`: it is yours to dial it, as the receiver of its activations or who can.

    `relay`: nothing connects you; what you have for its nodes goes to the coordinator, what it has comes from there.
    """

    peer: Name
    host: Name
    port: int
    dial: bool
    relay: bool = False


class EpochPush(Message, frozen=True):
    """Coordinator -> worker: the plan of an epoch. Load beside what you hold, dial, then report `EpochState`."""

    KIND: ClassVar[int] = 7
    epoch: int
    assignments: list[Assignment]
    peers: list[PeerAddress]


class EpochState(Message, frozen=True):
    """Worker -> coordinator: how far a node is with an epoch."""

    KIND: ClassVar[int] = 8
    epoch: int
    node: Name
    state: NodeState
    done: Count
    total: Count
    message: Text


class EpochRetire(Message, frozen=True):
    """Coordinator -> worker: every epoch below `epoch` is dead: close its sequences, drop its layers."""

    KIND: ClassVar[int] = 9
    epoch: int


class Open(Message, frozen=True):
    """Coordinator -> every hop: a sequence will come by. `next_node` is "" at the last stage.

    `sampling` and a payload of ids (prompt + emitted) only at the last stage. `score`: report the prompt's log
    probabilities. `prompt_tokens` is the client's prompt length, the same for every attempt.
    """

    KIND: ClassVar[int] = 10
    epoch: int
    sequence: int
    attempt: int
    node: Name
    start: int
    end: int
    next_node: Name
    prompt_tokens: Count
    sampling: SamplingParams | None
    score: bool


class Feed(Message, frozen=True):
    """Coordinator -> first hop: run the ids in the payload from position `start`; draw token `step` after the last.

    `sample` false: only fill KV and score (no token is wanted).
    """

    KIND: ClassVar[int] = 11
    epoch: int
    sequence: int
    attempt: int
    node: Name
    step: int
    start: int
    sample: bool


class Part(msgspec.Struct, frozen=True, array_like=True):
    """`n` rows of a payload: one sequence's positions `[start, start + n)` of the pass that draws token `step`."""

    sequence: int
    attempt: int
    step: int
    start: int
    n: Annotated[int, msgspec.Meta(ge=1)]
    sample: bool


class Activations(Message, frozen=True):
    """Hop -> next hop, with the rows of all parts in order as payload (the cluster's dtype, row-major).

    Between relayed neighbours: hop -> coordinator -> next hop, unchanged.
    """

    KIND: ClassVar[int] = 12
    incarnation: int
    epoch: int
    node: Name
    parts: list[Part]


class Drawn(msgspec.Struct, frozen=True, array_like=True):
    """A drawn token and, if asked for, its log probability and the best alternatives."""

    sequence: int
    attempt: int
    step: int
    token: int
    logprob: float | None = None
    top: list[tuple[int, float]] = []


class Tokens(Message, frozen=True):
    """Last hop -> coordinator: the tokens of one batch."""

    KIND: ClassVar[int] = 13
    node: Name
    drawn: list[Drawn]


class Scores(Message, frozen=True):
    """Last hop -> coordinator: `(logprob, top)` of the prompt's tokens `start`, `start + 1`, ..."""

    KIND: ClassVar[int] = 14
    sequence: int
    attempt: int
    start: int
    scores: list[tuple[float, list[tuple[int, float]]]]


class StageFailed(Message, frozen=True):
    """Hop -> coordinator: this sequence cannot go on here. `code`: kv_full, stale_epoch, link_lost, compute, order."""

    KIND: ClassVar[int] = 15
    sequence: int
    attempt: int
    node: Name
    code: Name
    message: Text


class Close(Message, frozen=True):
    """Coordinator -> hop: forget this attempt (and lower ones): free its KV, leave a tombstone, answer `Closed`."""

    KIND: ClassVar[int] = 16
    sequence: int
    attempt: int
    node: Name


class Closed(Message, frozen=True):
    """Hop -> coordinator: the KV of this attempt is free."""

    KIND: ClassVar[int] = 17
    sequence: int
    attempt: int
    node: Name


class LinkLost(Message, frozen=True):
    """Worker -> coordinator: my data link to that peer is down (or cannot be dialled)."""

    KIND: ClassVar[int] = 18
    peer: Name
    reason: Text


class PathSeen(msgspec.Struct, frozen=True, array_like=True):
    """What the data link to another worker is like at work; 0: not seen lately.

    `goodput_bytes_per_s` is known only where rows wait for the link.
    """

    peer: Name
    rtt_s: Seconds
    goodput_bytes_per_s: Rate


class NodeStatus(Message, frozen=True):
    """Worker -> coordinator, every second: how a node is doing.

    `paths` are the worker's, told with the first of its nodes.
    """

    KIND: ClassVar[int] = 19
    node: Name
    steps_done: Count
    oldest_work_age_s: Seconds
    queued_tokens: Count
    open_sequences: Count
    kv_used_token_layers: Count
    kv_capacity_token_layers: Count
    kv_pages_used: Count
    stale_frames: Count
    loop_lag_s: Seconds
    resident_bytes: Count
    weight_bytes_loaded: Count
    prefill_slowdown: Slowdown = 0.0
    decode_slowdown: Slowdown = 0.0
    paths: Annotated[list[PathSeen], msgspec.Meta(max_length=1024)] = []


class Fetch(Message, frozen=True):
    """Worker -> coordinator: send me `length` bytes of a tensor from `offset`; answered by `Fetched`, in order."""

    KIND: ClassVar[int] = 20
    request: int
    tensor: Name
    offset: Count
    length: Count


class Fetched(Message, frozen=True):
    """Coordinator -> worker, the bytes as payload. `dtype`, `shape`: the whole tensor's. `error`: "" if it worked."""

    KIND: ClassVar[int] = 21
    request: int
    dtype: Name
    shape: list[int]
    error: Text


class Leave(Message, frozen=True):
    """Worker -> coordinator: I am draining; route nothing new to me and move what is here."""

    KIND: ClassVar[int] = 22
    reason: Text


class Left(Message, frozen=True):
    """Coordinator -> worker: nothing of mine runs on you any more; you may go."""

    KIND: ClassVar[int] = 23


class Measure(Message, frozen=True):
    """Coordinator -> worker: measure this node again, unless it holds layers of a live plan; answered by `Measured`."""

    KIND: ClassVar[int] = 24
    node: Name
