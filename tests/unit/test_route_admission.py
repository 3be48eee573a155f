import pytest

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
