from heapq import heappop, heappush

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helixd.route.admission import AdmissionQueue, QueueFull, Ticket
from helixd.route.expectation import OutputLength


def items(tickets: list[Ticket[str]]) -> list[str]:
    return [ticket.item for ticket in tickets]


def filled(*names: str, **options: float) -> AdmissionQueue[str]:
    queue: AdmissionQueue[str] = AdmissionQueue(10, **options)
    for name in names:
        queue.push(name, now_s=0.0)
    return queue


def test_the_bound_on_both_sides() -> None:
    queue: AdmissionQueue[str] = AdmissionQueue(2)
    queue.push("a", now_s=0)
    queue.push("b", now_s=0)
    with pytest.raises(QueueFull, match="try again"):
        queue.push("c", now_s=0)
    assert len(queue) == 2
    with pytest.raises(QueueFull):
        AdmissionQueue[str](0).push("a", now_s=0)


def test_priority_first_then_arrival() -> None:
    queue = filled("a", "b")
    queue.push("urgent", now_s=1, priority=5)
    queue.push("c", now_s=2)
    assert items(queue.admit(3, lambda _: True)) == ["urgent", "a", "b", "c"]
    assert len(queue) == 0


def test_a_head_that_does_not_fit_is_passed_for_a_while_and_then_waited_for() -> None:
    queue = filled("big", "small1", passing_s=2, holding_s=3)
    assert items(queue.admit(10, lambda item: item != "big")) == ["small1"]
    for now_s, passes in ((11.9, True), (12.0, False), (14.9, False), (15.0, True), (17.0, False)):
        queue.push(f"small{now_s}", now_s=now_s)
        asked = items(queue.admit(now_s, lambda item: item != "big"))
        assert bool(asked) is passes, now_s
        queue.admit(15.5, lambda item: item != "big")
    assert items(queue.admit(20, lambda item: item == "big")) == ["big"]


def test_each_item_is_asked_once() -> None:
    queue = filled("a", "b", "c")
    asked: list[str] = []
    queue.admit(0, lambda item: bool(asked.append(item)))
    assert asked == ["a", "b", "c"]


def test_only_so_many_that_do_not_fit_are_asked() -> None:
    queue: AdmissionQueue[str] = AdmissionQueue(10, tries=2)
    for name in ("big1", "big2", "small"):
        queue.push(name, now_s=0.0)
    assert items(queue.admit(0.0, lambda item: item == "small")) == []
    assert items(queue.admit(0.0, lambda item: item != "big2")) == ["big1", "small"]
    with pytest.raises(ValueError, match="tries"):
        AdmissionQueue(10, tries=0)


def test_deadlines_on_both_sides() -> None:
    queue: AdmissionQueue[str] = AdmissionQueue(5)
    queue.push("a", now_s=0, deadline_s=10)
    queue.push("b", now_s=0)
    assert queue.expired(9.9) == []
    assert items(queue.expired(10)) == ["a"]
    assert len(queue) == 1


def test_a_cancelled_ticket_leaves_its_place() -> None:
    queue: AdmissionQueue[str] = AdmissionQueue(1)
    ticket = queue.push("a", now_s=0)
    assert queue.remove(ticket)
    assert not queue.remove(ticket)
    queue.push("b", now_s=0)


def test_expected_length_starts_at_the_prior_and_follows_what_is_seen() -> None:
    lengths = OutputLength(240)
    assert lengths.expect(1000) == 240
    for _ in range(200):
        lengths.observe(30)
    assert 30 <= lengths.expect(1000) <= 45
    for _ in range(3000):
        lengths.observe(600)
    assert 560 <= lengths.expect(1000) <= 600


def test_expected_length_knows_what_was_emitted_and_what_is_allowed() -> None:
    lengths = OutputLength(100)
    for _ in range(300):
        lengths.observe(10)
        lengths.observe(500)
    assert lengths.expect(1000) < 300
    # Whoever is past 20 tokens is one of the long ones.
    assert 430 <= lengths.expect(1000, emitted=20) <= 500
    assert lengths.expect(25, emitted=20) == 5
    assert lengths.expect(5000, emitted=900) == 900
    assert lengths.expect(10, emitted=10) == 1


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["push", "remove", "expire", "admit"]), st.integers(0, 9), st.integers(-1, 1), st.floats(0, 3)
    ),
    max_size=60,
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(STEPS, st.integers(0, 6))
def test_nobody_is_lost_or_let_in_twice_and_order_is_kept(steps: list[tuple[str, int, int, float]], limit: int) -> None:
    queue: AdmissionQueue[int] = AdmissionQueue(limit)
    waiting: dict[int, Ticket[int]] = {}
    now_s, count = 0.0, 0
    for what, size, priority, passed_s in steps:
        now_s += passed_s
        if what == "push":
            count += 1
            try:
                deadline_s = now_s + size if size > 5 else None
                waiting[count] = queue.push(count, now_s=now_s, priority=priority, deadline_s=deadline_s)
            except QueueFull:
                assert len(waiting) == limit
        elif what == "remove" and waiting:
            number = sorted(waiting)[size % len(waiting)]
            assert queue.remove(waiting.pop(number))
        elif what == "expire":
            late = {n for n, t in waiting.items() if t.deadline_s is not None and t.deadline_s <= now_s}
            assert {ticket.item for ticket in queue.expired(now_s)} == late
            for number in late:
                del waiting[number]
        elif what == "admit":
            room = size
            let_in = items_of(queue.admit(now_s, lambda number, room=room: number % 10 <= room))  # type: ignore[misc]
            expected = sorted(let_in, key=lambda number: (-waiting[number].priority, number))
            assert let_in == expected
            assert all(number % 10 <= room for number in let_in)
            for number in let_in:
                del waiting[number]
        assert len(queue) == len(waiting) <= limit


@settings(max_examples=60, deadline=None)
@given(st.floats(0.1, 60), st.integers(2, 8), st.floats(0.5, 3), st.floats(0.5, 3))
def test_neither_the_long_nor_the_short_wait_for_ever(
    served_s: float, room: int, passing_s: float, holding_s: float
) -> None:
    """A head that needs all the room, and short ones without end, each of which takes a part of it for `served_s`."""
    queue: AdmissionQueue[int] = AdmissionQueue(100, passing_s=passing_s, holding_s=holding_s)
    free, now_s, ends = room, 0.0, [(served_s * (n + 1) / room, 1) for n in range(room)]
    free = 0
    queue.push(room, now_s=0.0)
    longest_s, last_s = 0.0, 0.0
    while now_s < 20 * (served_s + passing_s + holding_s):
        now_s += min(served_s / room, passing_s, holding_s) / 4
        while ends and ends[0][0] <= now_s:
            free += heappop(ends)[1]
        while len(queue) < 3:
            queue.push(1, now_s=now_s)

        def admits(size: int, now_s: float = now_s) -> bool:
            nonlocal free
            if size > free:
                return False
            free -= size
            heappush(ends, (now_s + served_s, size))
            return True

        let_in = items_of(queue.admit(now_s, admits))
        if room in let_in:
            break
        if let_in:
            last_s = now_s
        longest_s = max(longest_s, now_s - last_s)
    else:
        pytest.fail("the head starves")
    # They may stand back for up to twice the time that room takes to gather.
    assert longest_s <= 2 * (served_s + passing_s + holding_s) + served_s


def items_of(tickets: list[Ticket[int]]) -> list[int]:
    return [ticket.item for ticket in tickets]


@settings(max_examples=100, deadline=None)
@given(
    st.floats(1, 4000),
    st.lists(st.integers(0, 5000), max_size=60),
    st.integers(1, 3000),
    st.integers(0, 4000),
)
def test_what_is_expected_is_something_and_never_more_than_is_allowed(
    prior: float, seen: list[int], most: int, emitted: int
) -> None:
    lengths = OutputLength(prior)
    for length in seen:
        lengths.observe(length)
    assert 1 <= lengths.expect(most, emitted=emitted) <= max(1, most - emitted)
