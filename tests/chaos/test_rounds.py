"""Three stages with two replicas each lose workers again and again, by force and by rolling restart (C1, C20).

And one of sixteen clients stops reading (C12).
"""

import json
import random
import re
import signal
import socket
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
from tests.daemons import Daemons, Stream, completion, daemons

pytestmark = pytest.mark.chaos

STREAMS = 16
NEW = 128
LATE = 110
SHORT = 32
"""Tokens of a request of the rolling restart: several begin and end while one worker is away."""
ROUNDS = examples(5, 20)
WRITE_STALL_S = examples(3, 30)
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
        write_stall = ("--set", f"api.limits.write_stall={WRITE_STALL_S}s")
        made.pinned_cluster(model[0], STAGES, *dead_after, *write_stall, worker=dead_after)
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
    before, equal, hit, longest_s = counted(made), 0, 0, list[float]()
    for number in range(ROUNDS):
        token = (10, 64, LATE)[number] if number < 3 else draw.randrange(2, LATE)
        with in_flight(made, prompts, NEW) as streams:
            until(lambda token=token: most(streams) >= token, f"token {token}")  # type: ignore[misc]
            victim = used(streams, ("b1", "b2"))
            made.all[victim].kill()
            hit += least(streams) < NEW
        assert_whole(streams, texts)
        equal += len(streams)
        longest_s += [max(stream.gaps_s) for stream in streams]
        made.restart(victim)
        whole(made, len(STAGES))
    moved = counted(made)["failovers"] - before["failovers"]
    print(
        f"C1: {equal}/{ROUNDS * STREAMS} streams equal the reference, 0 errors, {moved} moved by {hit} kills;"
        f" longest pause of a stream: median {share(longest_s, 0.5):.2f} s, p99 {share(longest_s, 0.99):.2f} s"
    )
    assert hit >= ROUNDS - 1, "the kills were to hit streams"
    assert moved >= hit
    assert max(longest_s) < DEAD_AFTER_S + MARGIN_S


def stops_reading(made: Daemons, prompt: list[int]) -> socket.socket:
    """A client that asks for a long answer, and reads its first bytes. Little of the rest fits on the way to it."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)
    host, port = made.api.split(":")
    client.connect((host, int(port)))
    body = {"model": "m", "prompt": prompt, "max_tokens": 450, "stream": True, "logprobs": 20, "ignore_eos": True}
    data = json.dumps({**body, "temperature": 0}).encode()
    client.sendall(
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n" % len(data)
    )
    client.sendall(data)
    assert client.recv(64).startswith(b"HTTP/1.1 200 ")
    return client


def test_c12_a_client_that_stops_reading_is_cut_off_and_the_others_do_not_wait_for_it(
    made: Daemons, prompts: list[list[int]], texts: list[str]
) -> None:
    with in_flight(made, prompts, NEW) as calm:
        pass
    aborts = made.figures("helixd_slow_client_aborts_total")[""]
    client = stops_reading(made, prompts[0])
    began_s = time.monotonic()
    with in_flight(made, prompts[1:], NEW) as streams:
        pass
    others_s = time.monotonic() - began_s
    assert_whole(streams, texts[1:])
    until(lambda: made.figures("helixd_slow_client_aborts_total")[""] > aborts, "the cut", WRITE_STALL_S + MARGIN_S)
    cut_s = time.monotonic() - began_s
    made.wait_idle()
    client.settimeout(10)
    rest = b""
    try:
        while data := client.recv(65536):
            rest += data
    except ConnectionError:
        pass
    client.close()
    token_s = [sum(map(mean_gap_s, some)) / len(some) for some in (calm[1:], streams)]
    print(
        f"C12: cut off {cut_s:.1f} s after its last read; {len(streams)} others exact and done after {others_s:.1f} s,"
        f" {token_s[1] * 1e3:.1f} ms a token beside {token_s[0] * 1e3:.1f} ms when it reads"
    )
    assert cut_s > WRITE_STALL_S
    assert b"[DONE]" not in rest


def mean_gap_s(stream: Stream) -> float:
    return sum(stream.gaps_s) / len(stream.gaps_s)


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
