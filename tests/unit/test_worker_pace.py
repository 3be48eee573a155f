"""When a device hangs: a step that takes longer than the limit and far longer than any before it."""

from helixd.worker.pace import LONGEST_USUAL, StepPace

LIMIT_S = 60.0


def after(*steps_s: float) -> StepPace:
    """A device that did these steps and began another one at 0."""
    pace = StepPace()
    for step_s in steps_s:
        pace.begin(0.0)
        pace.end(step_s)
    pace.begin(0.0)
    return pace


def test_a_device_without_work_does_not_hang() -> None:
    pace = StepPace()
    assert pace.overdue(1e9, LIMIT_S) is None
    pace.begin(0.0)
    pace.end(1.0)
    assert pace.overdue(1e9, LIMIT_S) is None


def test_a_step_may_take_the_limit() -> None:
    assert after().overdue(LIMIT_S, LIMIT_S) is None
    assert after().overdue(LIMIT_S + 0.1, LIMIT_S) == LIMIT_S + 0.1
    assert after(0.01).overdue(LIMIT_S + 0.1, LIMIT_S) is not None


def test_a_slow_device_is_not_a_hanging_one() -> None:
    """One long prefill among many short steps is what it is measured by."""
    slow = after(30.0, *[0.1] * 20)
    assert 20.0 < slow.usual_s < 30.0
    assert slow.overdue(LONGEST_USUAL * slow.usual_s, LIMIT_S) is None
    assert slow.overdue(LONGEST_USUAL * slow.usual_s + 1, LIMIT_S) is not None
    assert after(30.0, *[0.1] * 1000).usual_s < 1.0


def test_what_the_whole_process_slept_is_no_steps_time() -> None:
    pace = after()
    pace.excuse(3600.0)
    assert pace.overdue(3600.0 + LIMIT_S, LIMIT_S) is None
    assert pace.overdue(3601.0 + LIMIT_S, LIMIT_S) is not None
    StepPace().excuse(1.0)
