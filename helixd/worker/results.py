"""What a step's outcome is as messages: rows for the next hops, tokens and scores for the coordinator.

What is computed for a sequence that has ended meanwhile is left out. Sends nothing, and knows no engine.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from helixd.ids import Epoch, Incarnation, NodeId
from helixd.protocol.messages import Activations, Drawn, Part, Scores, Tokens
from helixd.sampling import TokenLogprobs
from helixd.worker.batcher import Pass
from helixd.worker.inbox import LocalSequence, SequenceBook
from helixd.worker.steps import DrawnToken

SCORES_PER_MESSAGE = 128
TOKENS_PER_MESSAGE = 128
"""With the most alternatives that may be asked for, so many are two thirds of what a message holds."""


class Rows(NamedTuple):
    """A message with its rows; an urgent one may overtake."""

    message: Activations
    payload: memoryview
    urgent: bool


def activations(
    book: SequenceBook, incarnation: Incarnation, to: NodeId, items: list[Pass], rows: memoryview, row_bytes: int
) -> Iterator[Rows]:
    """The messages that take `rows` (of `items`, one after another, `row_bytes` B each) to a node, most urgent first.

    Decode rows and prefill rows go in messages of their own: on a slow link the first must not wait.
    """
    by_kind: dict[tuple[Epoch, bool], list[tuple[Part, memoryview]]] = {}
    at = 0
    for item in items:
        piece = rows[at : at + item.n * row_bytes]
        at += item.n * row_bytes
        local = book.by_handle(item.handle)
        if local is not None:
            part = Part(local.sequence, local.attempt, item.step, item.start, item.n, item.sample)
            by_kind.setdefault((local.epoch, item.n == 1), []).append((part, piece))
    for epoch, urgent in sorted(by_kind, key=lambda kind: not kind[1]):
        parts = by_kind[epoch, urgent]
        payload = rows if len(parts) == len(items) else _joined([piece for _, piece in parts])
        yield Rows(Activations(incarnation, epoch, to, [part for part, _ in parts]), payload, urgent)


def tokens(book: SequenceBook, node: NodeId, drawn: Iterable[DrawnToken]) -> Iterator[Tokens]:
    """What `node` drew, in messages that fit into a frame."""
    told: list[Drawn] = []
    for each in drawn:
        local = book.by_handle(each.item.handle)
        if local is not None:
            logprob, top = (None, []) if each.logprobs is None else (each.logprobs.logprob, list(each.logprobs.top))
            told.append(Drawn(local.sequence, local.attempt, each.item.step, each.token, logprob, top))
    for at in range(0, len(told), TOKENS_PER_MESSAGE):
        yield Tokens(node, told[at : at + TOKENS_PER_MESSAGE])


def scores(
    book: SequenceBook, scored: Iterable[tuple[Pass, tuple[TokenLogprobs | None, ...]]]
) -> Iterator[Scores]:  # fmt: skip
    """The prompt's log probabilities, in messages that fit into a frame."""
    for item, found in scored:
        local = book.by_handle(item.handle)
        if local is None:
            continue
        flat = [(each.logprob, list(each.top)) for each in found if each is not None]
        for at in range(0, len(flat), SCORES_PER_MESSAGE):
            start = item.start + 1 + at
            yield Scores(local.sequence, local.attempt, start, flat[at : at + SCORES_PER_MESSAGE])


def following_ids(local: LocalSequence | None, item: Pass) -> tuple[int | None, ...] | None:
    """The prompt ids that follow each row, where the prompt's log probabilities are wanted."""
    if local is None or not local.score or local.next_node is not None:
        return None
    last = local.prompt_tokens
    return tuple(
        local.prefix[at + 1] if at + 1 < last else None for at in range(item.start, item.start + item.n)
    )  # fmt: skip


def _joined(pieces: list[memoryview]) -> memoryview:
    return pieces[0] if len(pieces) == 1 else memoryview(bytearray().join(pieces))
