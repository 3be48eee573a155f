"""How long a stretch of work takes on a device: wall time on a CPU, the device's own clock on a GPU.

A GPU works behind the back of whoever asks it to; its time is read once it must have finished anyway.
"""

import time

import torch


class Stopwatch:
    """Measures one stretch after another."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._on_gpu = device.type == "cuda"
        if self._on_gpu:
            self._begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            self._end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self._began_s = self._took_s = 0.0
        self._ran = False

    def start(self) -> None:
        """The stretch begins."""
        if self._on_gpu:
            self._begin.record(torch.cuda.current_stream(self._device))
        else:
            self._began_s = time.perf_counter()

    def stop(self) -> None:
        """All of it has been asked for."""
        if self._on_gpu:
            self._end.record(torch.cuda.current_stream(self._device))
        else:
            self._took_s = time.perf_counter() - self._began_s
        self._ran = True

    def read_s(self) -> float:
        """Seconds of the last stretch, 0 before the first; waits until a GPU is done with it."""
        if self._ran and self._on_gpu:
            self._end.synchronize()
            return float(self._begin.elapsed_time(self._end)) / 1000
        return self._took_s
