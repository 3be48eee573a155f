"""Streams under a fault: read to their ends by threads of their own, with the longest pause any client saw."""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from tests.daemons import Daemons, Stream

PATIENCE_S = 90.0


class TimedStream(Stream):
    """A stream that also knows its pauses, the one before the first piece not counted, in seconds."""

    def __init__(self, made: Daemons, body: dict[str, object]) -> None:
        super().__init__(made, body)
        self.gaps_s: list[float] = []
        self._last_s: float | None = None
        self._inner: Any = self.answer
        self.answer = self

    def readline(self) -> bytes:
        line: bytes = self._inner.readline()
        if line.startswith(b"data: {"):
            now_s = time.monotonic()
            if self._last_s is not None:
                self.gaps_s.append(now_s - self._last_s)
            self._last_s = now_s
        return line

    def close(self) -> None:
        self._inner.close()


class Load:
    """Use `load(...)`."""

    def __init__(self, streams: Sequence[TimedStream]) -> None:
        self.streams = streams

    @property
    def least(self) -> int:
        """Pieces that every client has."""
        return min(stream.pieces for stream in self.streams)

    @property
    def longest_gap_s(self) -> float:
        return max((gap_s for stream in self.streams for gap_s in stream.gaps_s), default=0.0)

    @property
    def mean_gap_s(self) -> float:
        gaps_s = [gap_s for stream in self.streams for gap_s in stream.gaps_s]
        return sum(gaps_s) / len(gaps_s)

    def reach(self, pieces: int) -> None:
        """Wait until every client has so many."""
        until(lambda: self.least >= pieces, f"every stream to have {pieces} pieces")

    def most_used(self, names: Sequence[str]) -> str:
        """Of these nodes the one that most routes lead over."""
        hops = [hop.split("[")[0] for stream in self.streams for hop in stream.route.split(" -> ")]
        return max(names, key=hops.count)

    def assert_whole(self, texts: Sequence[str]) -> None:
        """No client saw an error, and all have what an undisturbed reference says."""
        for stream, text in zip(self.streams, texts, strict=True):
            assert stream.error is None
            assert stream.done
            assert stream.reason == "length"
            assert stream.text == text


@contextmanager
def load(made: Daemons, prompts: Sequence[Sequence[int]], new: int, **fields: object) -> Iterator[Load]:
    """A stream per prompt, all of them read at once; at the end all have been read to their ends."""
    body = {"model": "m", "max_tokens": new, "stream": True, **fields}
    with ThreadPoolExecutor(len(prompts)) as threads:
        streams = list(threads.map(lambda prompt: TimedStream(made, {**body, "prompt": list(prompt)}), prompts))
        reading = [threads.submit(stream.read) for stream in streams]
        yield Load(streams)
        for each in reading:
            each.result()


def until(condition: Callable[[], bool], what: str, within_s: float = PATIENCE_S) -> None:
    deadline_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline_s, f"waited {within_s:g} s for {what}"
        time.sleep(0.002)
