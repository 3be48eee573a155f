"""Three stages with two replicas each lose workers again and again, by force and by rolling restart (C1, C20)."""

import random
import re
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from helixd.exits import Exit
from tests.budget import examples
from tests.chaos.streams import (
    assert_whole,
    clear_checkpoint,
    counted,
    in_flight,
    least,
    most,
    reference_text,
    share,
    until,
    used,
    whole,
)
from tests.daemons import Daemons, completion, daemons

pytestmark = pytest.mark.chaos

STREAMS = 16
NEW = 128
SHORT = 32
"""Tokens of a request of the rolling restart: several begin and end while one worker is away."""
ROUNDS = examples(5, 20)
ROLLS = examples(1, 8)
EVERY_S = 0.25
STAGES = {"a1": (0, 2), "a2": (0, 2), "b1": (2, 4), "b2": (2, 4), "c1": (4, 6), "c2": (4, 6)}
DEAD_AFTER_S = 3.0
MARGIN_S = 7.0
"""For computing again on a busy machine; far less than the deadline of a step (60 s) or of a request."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[int]]]:
    path = tmp_path_factory.mktemp("rounds") / "m"
    return path, clear_checkpoint(path, STREAMS, NEW)


@pytest.fixture(scope="module")
def prompts(model: tuple[Path, list[list[int]]]) -> list[list[int]]:
    return model[1]


@pytest.fixture(scope="module")
def texts(model: tuple[Path, list[list[int]]]) -> list[str]:
    """What the reference answers to the prompts."""
    return [reference_text(model[0], prompt, NEW) for prompt in model[1]]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, model: tuple[Path, list[list[int]]]) -> Iterator[Daemons]:
    with daemons(tmp_path_factory.mktemp("pairs")) as made:
        dead_after = ("--set", f"cluster.timers.dead_after={DEAD_AFTER_S}s")
        made.pinned_cluster(model[0], STAGES, *dead_after, worker=dead_after)
        made.wait_ready()
        yield made


@pytest.fixture
def made(running: Daemons) -> Iterator[Daemons]:
    """All six up; afterwards nothing is left of any request on any of them."""
    whole(running, len(STAGES))
    yield running
    print(running.tails())
    whole(running, len(STAGES))
    running.wait_idle()


def test_c1_a_middle_worker_is_killed_at_any_token_and_no_client_notices(
    made: Daemons, prompts: list[list[int]], texts: list[str]
) -> None:
    draw = random.Random(1)
    before, equal, longest_s = counted(made), 0, list[float]()
    for number in range(ROUNDS):
        token = (10, 64, 120)[number] if number < 3 else draw.randrange(2, NEW - 8)
        with in_flight(made, prompts, NEW) as streams:
            until(lambda token=token: most(streams) >= token, f"token {token}")  # type: ignore[misc]
            victim = used(streams, ("b1", "b2"))
            made.all[victim].kill()
            assert least(streams) < NEW, "the kill was to hit a stream"
        assert_whole(streams, texts)
        equal += len(streams)
        longest_s += [max(stream.gaps_s) for stream in streams]
        made.restart(victim)
        whole(made, len(STAGES))
    moved = counted(made)["failovers"] - before["failovers"]
    print(
        f"C1: {equal}/{ROUNDS * STREAMS} streams equal the reference, 0 errors, {moved} moved;"
        f" longest pause of a stream: median {share(longest_s, 0.5):.2f} s, p99 {share(longest_s, 0.99):.2f} s"
    )
    assert moved >= ROUNDS
    assert max(longest_s) < DEAD_AFTER_S + MARGIN_S


@dataclass
class Traffic:
    """Requests at a steady rate, every other one streamed. `wrong`: what was not answered exactly."""

    made: Daemons
    prompts: list[list[int]]
    texts: list[str]
    asked: int = 0
    wrong: list[str] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        with ThreadPoolExecutor(2 * STREAMS) as threads:
            next_s = time.monotonic()
            while not self.over.wait(max(0.0, next_s - time.monotonic())):
                threads.submit(self._ask, self.asked)
                self.asked += 1
                next_s += EVERY_S

    def _ask(self, number: int) -> None:
        prompt, text = self.prompts[number % STREAMS], self.texts[number % STREAMS]
        try:
            if number % 2:
                stream = completion(self.made, prompt, SHORT).read()
                said, end = stream.text, stream.reason if stream.done else f"{stream.error}"
            else:
                body = {"model": "m", "prompt": prompt, "max_tokens": SHORT, "temperature": 0, "ignore_eos": True}
                [choice] = self.made.post("/v1/completions", body)["choices"]
                said, end = choice["text"], choice["finish_reason"]
            if (said, end) != (text, "length"):
                self.wrong.append(f"request {number}: {end}, {said!r} for {text!r}")
        except Exception as error:
            self.wrong.append(f"request {number}: {error!r}")


def test_c20_a_rolling_restart_of_all_workers_is_noticed_by_no_client(
    made: Daemons, model: tuple[Path, list[list[int]]]
) -> None:
    path, prompts = model
    before = moves(made)
    traffic = Traffic(made, prompts, [reference_text(path, prompt, SHORT) for prompt in prompts])
    asking = threading.Thread(target=traffic.run)
    asking.start()
    try:
        for name in [*STAGES] * ROLLS:
            leaving = made.all[name]
            leaving.signal(signal.SIGTERM)
            assert leaving.wait_exit(60) == Exit.OK
            assert "drain_timeout" not in leaving.text
            made.restart(name)
            whole(made, len(STAGES))
    finally:
        traffic.over.set()
        asking.join()
    moved = moves(made) - before
    print(
        f"C20: {ROLLS} x {len(STAGES)} workers restarted, {traffic.asked} requests, {len(traffic.wrong)} wrong,"
        f" moved to other workers {moved} times"
    )
    assert not traffic.wrong, "\n".join(traffic.wrong)
    assert moved > 0


def moves(made: Daemons) -> int:
    """How often the requests that are over had to change their route."""
    return sum(int(times) for times in re.findall(r" request .* retries=(\d+)", made.all["coordinator"].text))
