"""What a node knows of its sequences: what arrives early, late, twice, out of order, or for another attempt."""

from hypothesis import given, settings
from hypothesis import strategies as st

from helixd.ids import Attempt, Epoch, SequenceId
from helixd.layers import LayerRange
from helixd.worker.batcher import Pass
from helixd.worker.inbox import EARLY_AGE_S, EARLY_BYTES, PARKED_BYTES, Early, LocalSequence, SequenceBook


def a_pass(handle: int, start: int, n: int, *, sample: bool = True, arrived_s: float = 0.0) -> Pass:
    ids = tuple(range(start, start + n))
    return Pass(SequenceId(handle), start + n, start, n, sample, arrived_s, token_ids=ids)


def local(sequence: int, attempt: int = 0, handle: int = 1) -> LocalSequence:
    return LocalSequence(
        SequenceId(handle), SequenceId(sequence), Attempt(attempt), Epoch(1), LayerRange(0, 2), None, 4, False, ()
    )  # fmt: skip


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


def test_ending_an_attempt_keeps_what_came_early_for_the_next_one() -> None:
    """The close of attempt 0 and the rows of attempt 1 travel over different links."""
    book = SequenceBook()
    book.hold_early(SequenceId(7), Early(Attempt(1), a_pass(0, 0, 3)))
    assert book.take_early(SequenceId(7), Attempt(0)) == []
    book.open(local(7, attempt=0, handle=1))
    book.close(SequenceId(7), Attempt(0))
    assert [item.n for item in book.take_early(SequenceId(7), Attempt(1))] == [3]


def test_ending_an_attempt_drops_what_came_early_for_it_and_older_ones() -> None:
    book = SequenceBook()
    for attempt in (0, 1, 2):
        book.hold_early(SequenceId(7), Early(Attempt(attempt), a_pass(0, 0, 3)))
    book.close(SequenceId(7), Attempt(1))
    assert [book.take_early(SequenceId(7), Attempt(attempt)) for attempt in (0, 1)] == [[], []]
    assert len(book.take_early(SequenceId(7), Attempt(2))) == 1


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


events = st.one_of(
    st.tuples(st.just("open"), st.integers(1, 2), st.integers(0, 2)),
    st.tuples(st.just("close"), st.integers(1, 2), st.integers(0, 2)),
    st.tuples(st.just("pass"), st.integers(1, 2), st.integers(0, 2), st.integers(0, 3)),
)


@settings(max_examples=300)
@given(st.lists(events, max_size=25))
def test_whatever_order_frames_come_in_an_open_attempt_gets_its_passes_in_order(log: list[tuple[object, ...]]) -> None:
    """As the node uses the book: attempts open once and end for good; every chunk sent to an open attempt comes out."""
    book = SequenceBook()
    handle = 0
    out: dict[tuple[int, int], list[int]] = {}
    sent: dict[tuple[int, int], set[int]] = {}
    over: dict[int, int] = {}
    opened: dict[int, int] = {}

    def run(key: tuple[int, int], item: Pass) -> None:
        found = book.get(SequenceId(key[0]), Attempt(key[1]))
        assert found is not None
        out[key] += [ready.start for ready in book.in_order(found, item)]

    for event in log:
        kind, sequence, attempt = event[:3]
        assert isinstance(sequence, int)
        assert isinstance(attempt, int)
        key = (sequence, attempt)
        dead = attempt <= over.get(sequence, -1) or attempt < opened.get(sequence, -1)
        assert book.is_over(SequenceId(sequence), Attempt(attempt)) == dead
        if kind == "open" and not dead and opened.get(sequence) != attempt:
            handle += 1
            book.open(local(sequence, attempt, handle))
            opened[sequence] = attempt
            out[key] = []
            for item in book.take_early(SequenceId(sequence), Attempt(attempt)):
                run(key, item)
        elif kind == "close":
            over[sequence] = max(attempt, over.get(sequence, -1))
            found = book.close(SequenceId(sequence), Attempt(attempt))
            assert (found is not None) == (opened.get(sequence, 99) <= attempt)
            if found is not None:
                del opened[sequence]
        elif kind == "pass" and not dead:
            number = event[3]
            assert isinstance(number, int)
            sent.setdefault(key, set()).add(number)
            item = a_pass(0, number * 3, 3)
            if opened.get(sequence) == attempt:
                run(key, item)
            else:
                book.hold_early(SequenceId(sequence), Early(Attempt(attempt), item))
    for key, starts in out.items():
        if opened.get(key[0]) == key[1]:
            whole = [number * 3 for number in range(4) if set(range(number + 1)) <= sent.get(key, set())]
            assert starts == whole
    assert len(book) == len(opened)


def rows(start: int, n: int, of: memoryview) -> Pass:
    return Pass(SequenceId(1), 0, start, n, False, 0.0, rows=of)


def test_rows_ahead_of_their_turn_are_kept_within_bounds() -> None:
    book = SequenceBook()
    opened = local(7)
    book.open(opened)
    size = PARKED_BYTES // 4
    for number in range(4):
        assert book.in_order(opened, rows(1 + number, 1, memoryview(bytes(size)))) == []
    assert book.stale_frames == 0
    assert book.in_order(opened, rows(5, 1, memoryview(bytes(1)))) == []
    assert book.stale_frames == 1
    # What comes in its turn is taken, and makes room.
    assert [item.start for item in book.in_order(opened, rows(0, 1, memoryview(bytes(size))))] == [0, 1, 2, 3, 4]
    assert book.in_order(opened, rows(6, 1, memoryview(bytes(PARKED_BYTES)))) == []
    assert book.stale_frames == 1
    book.close(SequenceId(7), Attempt(0))
    again = local(8, handle=2)
    book.open(again)
    assert book.in_order(again, rows(1, 1, memoryview(bytes(PARKED_BYTES)))) == []
    assert book.open(local(8, attempt=1, handle=3)) is again
    third = local(9, handle=4)
    book.open(third)
    assert book.in_order(third, rows(1, 1, memoryview(bytes(PARKED_BYTES)))) == []
    assert book.stale_frames == 1


def test_what_waits_does_not_keep_the_rest_of_its_frame() -> None:
    """A frame may hold the rows of many sequences, of which one came too soon."""
    book = SequenceBook()
    opened = local(7)
    book.open(opened)
    frame = bytearray(b"12345678")
    early = Early(Attempt(0), rows(0, 1, memoryview(frame)[:2]))
    book.hold_early(SequenceId(9), early)
    book.in_order(opened, rows(4, 1, memoryview(frame)[2:4]))
    del early
    frame += b"."  # BufferError while anything refers to it
    (item,) = book.take_early(SequenceId(9), Attempt(0))
    assert bytes(item.rows or b"") == b"12"
    assert bytes(opened.parked[4].rows or b"") == b"34"
