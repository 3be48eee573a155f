from collections import Counter, defaultdict
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helixd.ids import SequenceId
from helixd.worker.batcher import Batcher, BatchLimits, Pass

ROW = 4


def ids_pass(handle: int, start: int, n: int, *, step: int = 0, arrived_s: float = 0.0) -> Pass:
    return Pass(
        SequenceId(handle), step or start + n, start, n, True, arrived_s, token_ids=tuple(range(start, start + n))
    )


def rows_pass(handle: int, start: int, n: int) -> Pass:
    rows = b"".join(position.to_bytes(ROW, "little") for position in range(start, start + n))
    return Pass(SequenceId(handle), start + n, start, n, True, 0.0, rows=memoryview(bytearray(rows)))


def positions(item: Pass) -> list[int]:
    """The positions that the input itself names."""
    if item.token_ids is not None:
        return list(item.token_ids)
    assert item.rows is not None
    raw = bytes(item.rows)
    return [int.from_bytes(raw[at : at + ROW], "little") for at in range(0, len(raw), ROW)]


def filled(limits: BatchLimits, *items: Pass) -> Batcher:
    batcher = Batcher(limits)
    for item in items:
        batcher.add(item)
    return batcher


@pytest.mark.parametrize("make", [ids_pass, rows_pass])
@pytest.mark.parametrize("at", [1, 2, 4])
def test_a_split_pass_is_the_same_rows_in_two_parts_and_only_the_last_draws(make: object, at: int) -> None:
    whole: Pass = make(1, 10, 5)  # type: ignore[operator]
    head, tail = whole.split(at)
    assert (head.start, head.n, tail.start, tail.n) == (10, at, 10 + at, 5 - at)
    assert positions(head) + positions(tail) == list(range(10, 15))
    assert (head.sample, tail.sample) == (False, True)
    assert head.step == tail.step == whole.step


def test_decode_goes_before_a_prefill_that_came_first_but_for_one_chunk() -> None:
    batcher = filled(BatchLimits(8, 64, 16), ids_pass(1, 0, 40), ids_pass(2, 7, 1))
    assert [(item.handle, item.n) for item in batcher.next_batch()] == [(1, 16)]
    assert [(item.handle, item.n) for item in batcher.next_batch()] == [(2, 1), (1, 16)]


def test_less_than_half_a_chunk_is_no_step_of_its_own() -> None:
    for n, decodes in ((7, [2]), (8, [])):
        batch = filled(BatchLimits(8, 64, 16), ids_pass(1, 0, n), ids_pass(2, 7, 1)).next_batch()
        assert [item.handle for item in batch if item.n == 1] == decodes


def test_a_chunk_is_at_most_the_limit_on_both_sides() -> None:
    for n, first in ((15, 15), (16, 16), (17, 16)):
        batch = filled(BatchLimits(8, 64, 16), ids_pass(1, 0, n)).next_batch()
        assert [item.n for item in batch] == [first]
        assert batch[0].sample == (n <= 16)


def test_a_half_done_prefill_is_finished_before_the_next_begins() -> None:
    batcher = filled(BatchLimits(8, 64, 16), ids_pass(1, 0, 20), ids_pass(2, 0, 20))
    assert [(i.handle, i.start, i.n) for i in batcher.next_batch()] == [(1, 0, 16)]
    assert [(i.handle, i.start, i.n) for i in batcher.next_batch()] == [(1, 16, 4), (2, 0, 12)]


def test_decode_rows_leave_prefill_what_is_left_of_the_step() -> None:
    batcher = filled(BatchLimits(8, 6, 6), *(ids_pass(n, 9, 1) for n in range(4)), ids_pass(9, 0, 10))
    assert [(i.handle, i.n) for i in batcher.next_batch()] == [(9, 6)]
    assert [(i.handle, i.n) for i in batcher.next_batch()] == [(0, 1), (1, 1), (2, 1), (3, 1), (9, 2)]


def test_more_decoding_sequences_than_a_step_takes_go_in_turns() -> None:
    batcher = filled(BatchLimits(2, 64, 16), *(ids_pass(n, at, 1) for n in range(3) for at in (5, 6)))
    taken = [[(int(i.handle), i.start) for i in batcher.next_batch()] for _ in range(3)]
    assert taken == [[(0, 5), (1, 5)], [(2, 5), (0, 6)], [(1, 6), (2, 6)]]


def test_a_long_pass_behind_a_single_row_is_prefill_again() -> None:
    batcher = filled(BatchLimits(8, 64, 16), ids_pass(1, 0, 1), ids_pass(1, 1, 20))
    assert [[item.n for item in batcher.next_batch()] for _ in range(3)] == [[1], [16], [4]]


def test_held_back_prefill_waits_and_decode_does_not() -> None:
    batcher = filled(BatchLimits(8, 64, 16), ids_pass(1, 0, 4), ids_pass(2, 0, 4), ids_pass(3, 9, 1))
    assert [i.handle for i in batcher.next_batch(lambda handle: handle != 2)] == [3, 2]
    assert batcher.next_batch(lambda handle: True) == []
    assert batcher.queued_tokens == 4
    assert [i.handle for i in batcher.next_batch()] == [1]


def test_a_dropped_sequence_leaves_nothing_behind() -> None:
    batcher = filled(BatchLimits(8, 64, 4), ids_pass(1, 0, 10, arrived_s=1.0), ids_pass(2, 3, 1, arrived_s=2.0))
    for _ in range(2):
        batcher.next_batch()
    batcher.drop(SequenceId(1))
    batcher.drop(SequenceId(99))
    assert batcher.queued_tokens == 0
    assert batcher.oldest_arrival_s() is None
    assert batcher.next_batch() == []


def test_the_oldest_arrival_is_that_of_what_still_waits() -> None:
    batcher = filled(BatchLimits(1, 64, 4), ids_pass(1, 3, 1, arrived_s=1.0), ids_pass(2, 3, 1, arrived_s=2.0))
    assert batcher.oldest_arrival_s() == 1.0
    batcher.next_batch()
    assert batcher.oldest_arrival_s() == 2.0


@dataclass(frozen=True)
class World:
    limits: BatchLimits
    arrivals: list[list[tuple[int, int]]]  # per step: (sequence, rows) that arrive before it
    held: frozenset[int]


worlds = st.builds(
    World,
    st.builds(BatchLimits, st.integers(1, 5), st.integers(1, 12), st.integers(1, 12)),
    st.lists(st.lists(st.tuples(st.integers(0, 5), st.one_of(st.just(1), st.integers(1, 30))), max_size=5), max_size=8),
    st.frozensets(st.integers(0, 5), max_size=3),
)


@settings(max_examples=400, deadline=None)
@given(worlds)
def test_any_arrivals_are_computed_once_in_order_and_within_the_limits(world: World) -> None:
    batcher = Batcher(world.limits)
    due: Counter[int] = Counter()
    done: defaultdict[int, list[int]] = defaultdict(list)
    limits = world.limits

    def step(held: frozenset[int]) -> list[Pass]:
        batch = batcher.next_batch(lambda handle: handle in held)
        handles = [item.handle for item in batch]
        assert len(set(handles)) == len(handles) <= limits.max_sequences
        assert sum(item.n for item in batch) <= limits.max_tokens
        assert sum(item.n for item in batch if item.n > 1) <= limits.chunk_tokens
        for item in batch:
            assert positions(item) == list(range(item.start, item.start + item.n))
            done[item.handle].extend(positions(item))
        assert batcher.queued_tokens == sum(due.values()) - sum(map(len, done.values()))
        return batch

    for arrivals in world.arrivals:
        for handle, n in arrivals:
            batcher.add(rows_pass(handle, due[handle], n))
            due[handle] += n
        step(world.held)
    for _ in range(sum(due.values())):
        step(frozenset())
    assert batcher.queued_tokens == 0
    assert done == {handle: list(range(n)) for handle, n in due.items() if n}


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(2, 60), min_size=1, max_size=6), st.integers(1, 8))
def test_a_waiting_decode_row_is_in_the_next_batch_or_the_one_after(prefills: list[int], chunk: int) -> None:
    batcher = Batcher(BatchLimits(8, 16, chunk))
    for handle, n in enumerate(prefills):
        batcher.add(ids_pass(handle, 0, n))
    for at in range(sum(prefills)):
        batcher.add(ids_pass(100, at, 1))
        taken = [item.handle for item in batcher.next_batch()]
        if 100 not in taken:
            taken = [item.handle for item in batcher.next_batch()]
        assert 100 in taken
