"""Clients that are too many, leave at any moment, or never finish asking, and a worker that comes twice (C11 to C25).

Two stages with KV cache for four answers. What is asked of the coordinator's line is changed by SIGHUP.
"""

import asyncio
import json
import os
import random
import re
import signal
import socket
import struct
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from helixd.coordinator.admission import KV_PAGE_TOKENS
from helixd.coordinator.planning import ModelSizes
from helixd.exits import Exit
from helixd.model.config import load_config
from tests.budget import examples
from tests.chaos.streams import (
    assert_whole,
    clear_checkpoint,
    counted,
    in_flight,
    reference_text,
    share,
    until,
    whole,
)
from tests.daemons import Daemons, completion, daemons

pytestmark = pytest.mark.chaos

NEW = 100
"""With the shortest prompt more than a page of KV, with the longest not more than two."""
AT_ONCE = 4
STAGES = {"a": (0, 3), "b": (3, 6)}
PREEMPTED = examples(32, 96)
QUEUE = 8
CROWD = examples(100, 400)
LEAVERS = examples(200, 600)
CONNECTIONS = 1000
DEAD_AFTER_S = 30.0
"""Long: a worker that is stopped for a while is not lost."""
REFUSED_MS = 50.0
HEADERS_S = 10.0
SLACK_S = 7.0
"""For a busy machine. All that is bounded by it would else take minutes, or for ever."""


@dataclass(frozen=True)
class Model:
    path: Path
    prompts: list[list[int]]
    texts: list[str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    path = tmp_path_factory.mktemp("clients") / "m"
    prompts = clear_checkpoint(path, 8, NEW, 2 * KV_PAGE_TOKENS - NEW)
    return Model(path, prompts, [reference_text(path, prompt, NEW) for prompt in prompts])


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, model: Model) -> Iterator[Daemons]:
    sizes = ModelSizes.of(load_config(model.path), "float32")
    kv_bytes = AT_ONCE * 2 * KV_PAGE_TOKENS * sizes.kv_bytes_per_token_layer
    home = tmp_path_factory.mktemp("daemons")
    with daemons(home) as made:
        pins = "".join(f'[planner.pins."{name}"]\nrange = [{a}, {b}]\n' for name, (a, b) in STAGES.items())
        (home / "pins").write_text(pins)
        limit(made, "")
        timers = ("--set", f"cluster.timers.dead_after={DEAD_AFTER_S}s")
        made.coordinator(
            model.path, "--config", str(home / "helixd.toml"), *timers, "--set", "planner.wait_for_nodes=2",
            "--set", "planner.mean_output_tokens=4",
        )  # fmt: skip
        for name, (start, end) in STAGES.items():
            memory = sizes.weights_of(range(start, end)) + (end - start) * kv_bytes
            made.worker(name, f"{memory}B", *timers)
        made.wait_ready()
        yield made


@pytest.fixture
def made(running: Daemons) -> Iterator[Daemons]:
    """Both up; afterwards nothing is left of any request on any of them."""
    whole(running, len(STAGES))
    yield running
    print(running.tails())
    whole(running, len(STAGES))
    running.wait_idle()


def limit(made: Daemons, limits: str) -> None:
    """Other lines of `[api.limits]` in the coordinator's file; a running one takes them."""
    file = made.home / "helixd.toml"
    file.write_text(f"[api.limits]\n{limits}\n{(made.home / 'pins').read_text()}")
    if "coordinator" in made.all:
        coordinator = made.all["coordinator"]
        before = coordinator.text.count(" reloaded ")
        coordinator.signal(signal.SIGHUP)
        until(lambda: coordinator.text.count(" reloaded ") > before, "the coordinator to read its file anew")


def again(values: list[str], count: int) -> list[str]:
    return [values[number % len(values)] for number in range(count)]


def test_c14_more_than_the_kv_holds_is_preempted_and_everybody_gets_the_whole_answer(
    made: Daemons, model: Model
) -> None:
    room = 3 * AT_ONCE * 2 * KV_PAGE_TOKENS
    nodes = lambda: made.get("/cluster")["nodes"]  # noqa: E731
    made.wait(lambda: all(node["load"]["kv_capacity_token_layers"] for node in nodes()), "layers to be loaded")
    assert [node["load"]["kv_capacity_token_layers"] for node in nodes()] == [room] * len(STAGES)
    before = counted(made)["preemptions"]
    prompts = [model.prompts[number % len(model.prompts)] for number in range(PREEMPTED)]
    with in_flight(made, prompts, NEW) as streams:
        pass
    assert_whole(streams, again(model.texts, PREEMPTED))
    preemptions = counted(made)["preemptions"] - before
    print(f"C14: {len(streams)}/{PREEMPTED} exact with KV for {AT_ONCE}, {preemptions} preemptions")
    assert preemptions > 0
    assert not any("MemoryError" in daemon.text for daemon in made.all.values())


@dataclass
class Answered:
    status: int
    text: str
    retry_after: str | None = None


def test_c15_exactly_the_overflow_of_the_line_is_turned_away_at_once(made: Daemons, model: Model) -> None:
    limit(made, f"queue = {QUEUE}")
    refused: list[Answered] = []

    def ask(number: int) -> Answered:
        prompt = model.prompts[number % len(model.prompts)]
        body = {"model": "m", "prompt": prompt, "max_tokens": NEW, "temperature": 0, "ignore_eos": True}
        asked = urllib.request.Request(
            f"http://{made.api}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(asked, timeout=120) as answer:
                return Answered(answer.status, json.load(answer)["choices"][0]["text"])
        except urllib.error.HTTPError as error:
            answered = Answered(error.code, json.load(error)["error"]["code"], error.headers["Retry-After"])
            refused.append(answered)
            return answered

    # Nothing ends while the crowd arrives: whoever is turned away is so by the line alone.
    made.all["b"].signal(signal.SIGSTOP)
    try:
        with ThreadPoolExecutor(CROWD) as threads:
            asking = [threads.submit(ask, number) for number in range(CROWD)]
            try:
                until(lambda: sum(map(counted(made).get, ("running", "waiting"))) + len(refused) == CROWD, "everybody")
                at_rest = counted(made)
                turned_away = len(refused)
            finally:
                made.all["b"].signal(signal.SIGCONT)
            answers = [each.result() for each in asking]
    finally:
        made.all["b"].signal(signal.SIGCONT)
        limit(made, "")
    assert at_rest["waiting"] == QUEUE
    assert at_rest["running"] > 0
    assert turned_away == len(refused) == CROWD - QUEUE - at_rest["running"]
    assert {(answer.status, answer.text) for answer in refused} == {(429, "rate_limit_exceeded")}
    assert all(answer.retry_after and int(answer.retry_after) >= 1 for answer in refused)
    served = [answer.status == 200 for answer in answers]
    took = re.findall(r"outcome=rate_limit_exceeded .* total_s=([\d.]+)", made.all["coordinator"].text)
    took_ms = [1e3 * float(total_s) for total_s in took]
    print(
        f"C15: of {CROWD} at once {at_rest['running']} ran, {QUEUE} waited, {len(refused)} got 429, {sum(served)} were"
        f" served; a 429 took the coordinator {share(took_ms, 0.5):.1f} ms (median), {max(took_ms):.1f} ms (most)"
    )
    assert len(took) == len(refused)
    assert share(took_ms, 0.5) < REFUSED_MS
    assert sum(served) == CROWD - len(refused)
    for answer, text in zip(answers, again(model.texts, CROWD), strict=True):
        assert answer.status == 429 or answer.text == text


def post(body: dict[str, object]) -> bytes:
    data = json.dumps({"model": "m", "temperature": 0, "ignore_eos": True, **body}).encode()
    return (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n" % len(data)
    ) + data


async def leave(made: Daemons, prompt: list[int], draw: random.Random) -> None:
    """Ask for a long answer, or begin to, and be gone at a byte of the question or the answer, or out of patience."""
    host, port = made.api.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    question = post({"prompt": prompt, "max_tokens": 400, "stream": draw.random() < 0.7})
    if draw.random() < 0.15:
        question = question[: draw.randrange(len(question))]
    to_read, patience_s = draw.choice((0, 1, draw.randrange(400), draw.randrange(40_000))), draw.uniform(0, 4)
    try:
        writer.write(question)
        async with asyncio.timeout(patience_s):
            while to_read > 0:
                data = await reader.read(min(to_read, 4096))
                if not data:
                    break
                to_read -= len(data)
    except TimeoutError:
        pass
    if draw.random() < 0.5:
        # A reset instead of an orderly end.
        linger = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.transport.abort()
    writer.close()


def test_c11_clients_that_leave_at_any_byte_leave_nothing_behind(made: Daemons, model: Model) -> None:
    draw = random.Random(11)

    async def come_and_go() -> None:
        async with asyncio.TaskGroup() as clients:
            for number in range(LEAVERS):
                clients.create_task(leave(made, model.prompts[number % len(model.prompts)], draw))

    before = made.figures("helixd_request_success_total")
    asyncio.run(come_and_go())
    left_s = time.monotonic()

    def nothing_held() -> bool:
        view = made.get("/cluster")
        held = sum(node["kv_reserved_token_layers"] for node in view["nodes"])
        return bool(view["requests"]["running"] == view["requests"]["waiting"] == held == 0)

    until(nothing_held, "everything to be free", SLACK_S)
    freed_s = time.monotonic() - left_s
    made.wait_idle()
    after = made.figures("helixd_request_success_total")
    ends = {label: int(value - before.get(label, 0)) for label, value in after.items() if value > before.get(label, 0)}
    print(f"C11: {LEAVERS} clients left, all KV was free {freed_s * 1e3:.0f} ms after the last; ends: {ends}")
    # Who never finished asking, or left the line, was never admitted; a few leave when all is said and not yet read.
    aborted = sum(count for label, count in ends.items() if "abort" in label)
    finished = sum(count for label, count in ends.items() if "length" in label)
    assert aborted > finished
    assert aborted + finished == sum(ends.values()) <= LEAVERS
    assert made.figures("helixd_num_requests_running") == {'{model_name="m"}': 0.0}
    with in_flight(made, model.prompts[:AT_ONCE], NEW) as streams:
        pass
    assert_whole(streams, model.texts[:AT_ONCE])


def test_c24_a_thousand_connections_that_never_finish_asking_keep_nobody_from_being_served(
    made: Daemons, model: Model
) -> None:
    host, port = made.api.split(":")

    async def dribble(open_now: set[int], number: int, lasted_s: list[float]) -> None:
        reader, writer = await asyncio.open_connection(host, int(port))
        began_s = time.monotonic()
        open_now.add(number)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n")
        try:
            while True:
                try:
                    async with asyncio.timeout(1.0):
                        if not await reader.read(1):
                            break
                except TimeoutError:
                    writer.write(b"X-a: b\r\n")
        except ConnectionError:
            pass
        lasted_s.append(time.monotonic() - began_s)
        open_now.discard(number)
        writer.close()

    def served(number: int) -> float:
        began_s = time.monotonic()
        stream = completion(made, model.prompts[number], NEW).read(at_most=1)
        first_s = time.monotonic() - began_s
        stream.read()
        assert_whole([stream], [model.texts[number]])
        return first_s

    async def scenario() -> tuple[list[float], int, list[float]]:
        open_now, lasted_s, waited_s = set[int](), list[float](), list[float]()
        async with asyncio.TaskGroup() as slow:
            for number in range(CONNECTIONS):
                slow.create_task(dribble(open_now, number, lasted_s))
                if number % 50 == 0:
                    await asyncio.sleep(0)
            async with asyncio.timeout(SLACK_S):
                while len(open_now) < CONNECTIONS:
                    await asyncio.sleep(0.01)
            for number in range(3):
                waited_s.append(await asyncio.to_thread(served, number))
            still_open = len(open_now)
        return waited_s, still_open, lasted_s

    waited_s, still_open, lasted_s = asyncio.run(scenario())
    print(
        f"C24: with {still_open} connections that never finish asking the first token came after"
        f" {max(waited_s) * 1e3:.0f} ms at most; they were closed after {min(lasted_s):.1f} to {max(lasted_s):.1f} s"
    )
    assert still_open == CONNECTIONS
    assert len(lasted_s) == CONNECTIONS
    assert min(lasted_s) > HEADERS_S - 1.0
    assert max(lasted_s) < HEADERS_S + SLACK_S


def test_c25_of_two_daemons_of_one_image_the_newer_life_serves_and_the_other_is_refused(
    made: Daemons, model: Model
) -> None:
    """A machine's image that is started twice."""
    original = made.all["a"]
    state = json.loads((made.home / "a" / "identity.json").read_text())
    twin_home = made.home / "twin"
    twin_home.mkdir()
    image = {**state, "incarnation": state["incarnation"] - 1}
    (twin_home / "identity.json").write_text(json.dumps(image))
    os.chmod(twin_home, 0o700)
    with in_flight(made, model.prompts[:AT_ONCE], NEW) as streams:
        twin = made.start("twin", *original.arguments)
        try:
            assert twin.wait_exit(120) == Exit.REJECTED
        finally:
            made.all.pop("twin").kill()
    assert_whole(streams, model.texts[:AT_ONCE])
    [line] = [line for line in twin.text.splitlines() if " rejected " in line]
    assert "is linked with incarnation" in line
    assert original.process.poll() is None
    print(f"C25: {line}")

    # Started once more it has lived more often than the first, and passes for its next life.
    with in_flight(made, model.prompts[:AT_ONCE], NEW) as streams:
        made.all["a"] = twin = made.start("twin", *original.arguments)
        del made.all["twin"]
        assert original.wait_exit(120) == Exit.REJECTED
    assert_whole(streams, model.texts[:AT_ONCE])
    whole(made, len(STAGES))
    twin.kill()
    made.restart("a")
