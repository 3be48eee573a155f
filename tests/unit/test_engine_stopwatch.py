"""The time of a stretch of work, by whatever clock the device has."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from helixd.engine.stopwatch import Stopwatch


def test_on_a_processor_it_is_wall_time_and_the_last_stretch_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([1.0, 1.5, 7.0, 7.25])
    monkeypatch.setattr("helixd.engine.stopwatch.time.perf_counter", lambda: next(ticks))
    watch = Stopwatch(torch.device("cpu"))
    assert watch.read_s() == 0.0
    for expected in (0.5, 0.25):
        watch.start()
        watch.stop()
        assert watch.read_s() == expected


def test_on_a_gpu_it_is_the_stream_of_that_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the driver: the second of two GPUs is asked, and waited for before its time is read."""
    did: list[Any] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: str) -> None:
            did.append(("record", stream))

        def synchronize(self) -> None:
            did.append("wait")

        def elapsed_time(self, other: "Event") -> float:
            did.append("read")
            return 12.5

    cuda = SimpleNamespace(Event=Event, current_stream=lambda device: f"stream of {device}")
    monkeypatch.setattr("helixd.engine.stopwatch.torch.cuda", cuda)
    watch = Stopwatch(torch.device("cuda:1"))
    assert watch.read_s() == 0.0
    watch.start()
    watch.stop()
    assert watch.read_s() == pytest.approx(0.0125)
    assert did == [("record", "stream of cuda:1"), ("record", "stream of cuda:1"), "wait", "read"]
