"""The pure parts of a worker: what runs next, and what arrives early, late, twice or out of order."""

from hypothesis import given
from hypothesis import strategies as st

from helixd.ids import Attempt, Epoch, SequenceId
from helixd.layers import LayerRange
from helixd.worker.batcher import Batcher, BatchLimits, Pass
from helixd.worker.inbox import EARLY_AGE_S, EARLY_BYTES, Early, LocalSequence, SequenceBook


def a_pass(handle: int, start: int, n: int, *, sample: bool = True, arrived_s: float = 0.0) -> Pass:
    ids = tuple(range(start, start + n))
    return Pass(SequenceId(handle), start + n, start, n, sample, arrived_s, token_ids=ids)


def local(sequence: int, attempt: int = 0, handle: int = 1) -> LocalSequence:
    return LocalSequence(
        SequenceId(handle), SequenceId(sequence), Attempt(attempt), Epoch(1), LayerRange(0, 2), None, 4, False, ()
    )  # fmt: skip


@given(
    work=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 40)), max_size=30),
    limits=st.builds(BatchLimits, st.integers(1, 5), st.integers(1, 32), st.integers(1, 16)),
)
def test_everything_runs_once_in_order_within_the_limits(work: list[tuple[int, int]], limits: BatchLimits) -> None:
    batcher = Batcher(limits)
    ends = dict.fromkeys(range(1, 7), 0)
    for handle, n in work:
        batcher.add(a_pass(handle, ends[handle], n))
        ends[handle] += n
    assert batcher.queued_tokens == sum(n for _, n in work)
    seen = dict.fromkeys(range(1, 7), 0)
    draws = dict.fromkeys(range(1, 7), 0)
    while batch := batcher.next_batch():
        assert len(batch) <= limits.max_sequences
        assert len({item.handle for item in batch}) == len(batch)
        assert sum(item.n for item in batch) <= max(limits.max_tokens, 1)
        for item in batch:
            assert item.start == seen[item.handle]
            assert item.token_ids == tuple(range(item.start, item.start + item.n))
            seen[item.handle] += item.n
            draws[item.handle] += item.sample
    assert seen == ends
    assert draws == {handle: sum(h == handle for h, _ in work) for handle in draws}
    assert batcher.queued_tokens == 0


def test_decodes_overtake_a_long_prompt() -> None:
    batcher = Batcher(BatchLimits(8, 64, 16))
    batcher.add(a_pass(1, 0, 100))
    first = batcher.next_batch()
    assert [(item.handle, item.n, item.sample) for item in first] == [(1, 16, False)]
    batcher.add(a_pass(2, 9, 1))
    assert [(item.handle, item.n) for item in batcher.next_batch()] == [(2, 1), (1, 16)]


def test_prefill_for_a_congested_hop_waits_and_decodes_do_not() -> None:
    batcher = Batcher(BatchLimits(8, 64, 16))
    batcher.add(a_pass(1, 0, 20))
    batcher.add(a_pass(2, 5, 1))
    assert [item.handle for item in batcher.next_batch(lambda handle: True)] == [2]
    assert batcher.next_batch(lambda handle: True) == []
    assert [item.handle for item in batcher.next_batch()] == [1]


def test_dropping_a_sequence_forgets_its_rows() -> None:
    batcher = Batcher(BatchLimits(8, 64, 16))
    batcher.add(a_pass(1, 0, 20))
    batcher.drop(SequenceId(1))
    assert batcher.queued_tokens == 0
    assert batcher.next_batch() == []
    assert batcher.oldest_arrival_s() is None


def test_rows_are_cut_with_their_bytes() -> None:
    item = Pass(SequenceId(1), 4, 0, 4, True, 0.0, rows=memoryview(bytearray(range(8))))
    head, tail = item.split(1)
    assert (head.rows, tail.rows) == (memoryview(bytes([0, 1])), memoryview(bytes([2, 3, 4, 5, 6, 7])))
    assert (head.sample, tail.sample, tail.start, tail.n) == (False, True, 1, 3)


@given(order=st.permutations(range(6)), repeats=st.lists(st.integers(0, 5), max_size=4))
def test_chunks_in_any_order_come_out_in_order_once(order: list[int], repeats: list[int]) -> None:
    book = SequenceBook()
    opened = local(7)
    book.open(opened)
    out: list[int] = []
    for number in (*order, *repeats):
        out += [item.start for item in book.in_order(opened, a_pass(1, number * 3, 3))]
    assert out == [0, 3, 6, 9, 12, 15]
    assert book.stale_frames == len(repeats)


def test_a_closed_attempt_leaves_a_tombstone_and_a_later_one_may_open() -> None:
    book = SequenceBook()
    book.open(local(7, attempt=1))
    assert book.close(SequenceId(7), Attempt(1)) is not None
    assert book.close(SequenceId(7), Attempt(1)) is None
    assert book.is_over(SequenceId(7), Attempt(0))
    assert book.is_over(SequenceId(7), Attempt(1))
    assert not book.is_over(SequenceId(7), Attempt(2))
    book.open(local(7, attempt=2, handle=2))
    assert book.is_over(SequenceId(7), Attempt(1))
    assert book.close(SequenceId(7), Attempt(1)) is None
    assert book.get(SequenceId(7), Attempt(2)) is not None


def test_a_newer_attempt_takes_the_place_of_an_open_one() -> None:
    book = SequenceBook()
    first = local(7, attempt=0, handle=1)
    book.open(first)
    assert book.open(local(7, attempt=1, handle=2)) is first
    assert book.by_handle(SequenceId(1)) is None
    assert len(book) == 1


def test_early_passes_wait_for_their_open_and_only_for_their_attempt() -> None:
    book = SequenceBook()
    book.hold_early(SequenceId(7), Early(Attempt(0), a_pass(0, 0, 2)))
    book.hold_early(SequenceId(7), Early(Attempt(1), a_pass(0, 0, 3)))
    assert [item.n for item in book.take_early(SequenceId(7), Attempt(1))] == [3]
    assert book.take_early(SequenceId(7), Attempt(1)) == []


def test_early_passes_are_bounded_in_bytes_and_in_age() -> None:
    book = SequenceBook()
    half = memoryview(bytearray(EARLY_BYTES // 2))
    for sequence in (1, 2):
        book.hold_early(SequenceId(sequence), Early(Attempt(0), Pass(SequenceId(0), 1, 0, 1, True, 5.0, rows=half)))
    assert book.stale_frames == 0
    book.hold_early(SequenceId(3), Early(Attempt(0), a_pass(0, 0, 1, arrived_s=6.0)))
    assert book.stale_frames == 1
    assert book.take_early(SequenceId(1), Attempt(0)) == []
    book.expire_early(5.0 + EARLY_AGE_S)
    assert book.stale_frames == 1
    book.expire_early(5.5 + EARLY_AGE_S)
    assert book.stale_frames == 2
    assert len(book.take_early(SequenceId(3), Attempt(0))) == 1
