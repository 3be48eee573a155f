"""Three stages without replicas: the only pipeline goes and comes back or does not, or the coordinator does: C8-C10."""

import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.budget import examples
from tests.chaos.streams import (
    assert_whole,
    clear_checkpoint,
    in_flight,
    least,
    loaded,
    reference_text,
    until,
    whole,
)
from tests.daemons import Daemon, Daemons, daemons

pytestmark = pytest.mark.chaos

NEW = 96
CHAIN = {"a": (0, 2), "b": (2, 4), "c": (4, 6)}
AWAY_S = examples(5, 15)
KEEP_ALIVE_S = examples(1, 10)
FAILOVER_WAIT_S = 30.0
JOIN_RETRY_MAX_S = 5.0
ORPHANS_S = 10.0
"""The longest that KV may outlive the coordinator that it was for."""
MARGIN_S = 2.0
SLACK_S = 7.0
"""For what is computed meanwhile, on a busy machine."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[int]]]:
    path = tmp_path_factory.mktemp("chain") / "m"
    return path, clear_checkpoint(path, 8, NEW)


@pytest.fixture(scope="module")
def prompts(model: tuple[Path, list[list[int]]]) -> list[list[int]]:
    return model[1]


@pytest.fixture(scope="module")
def texts(model: tuple[Path, list[list[int]]]) -> list[str]:
    """What the reference answers to the prompts."""
    return [reference_text(model[0], prompt, NEW) for prompt in model[1]]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, model: tuple[Path, list[list[int]]]) -> Iterator[Daemons]:
    with daemons(tmp_path_factory.mktemp("daemons")) as made:
        made.pinned_cluster(
            model[0], CHAIN, "--set", f"api.limits.keep_alive={KEEP_ALIVE_S}s",
            "--set", f"cluster.timers.failover_wait={FAILOVER_WAIT_S}s",
            worker=("--set", f"cluster.timers.join_retry_max={JOIN_RETRY_MAX_S}s"),
        )  # fmt: skip
        made.wait_ready()
        yield made


@pytest.fixture
def made(running: Daemons) -> Iterator[Daemons]:
    """All three up; afterwards nothing is left of any request on any of them."""
    whole(running, len(CHAIN))
    yield running
    print(running.tails())
    whole(running, len(CHAIN))
    running.wait_idle()


def test_c8_the_only_last_stage_comes_back_and_the_streams_go_on_where_they_were(
    made: Daemons, prompts: list[list[int]], texts: list[str]
) -> None:
    with in_flight(made, prompts, NEW) as streams:
        until(lambda: least(streams) >= 5, "the streams to get going")
        made.all["c"].kill()
        time.sleep(AWAY_S)
        made.restart("c")
    assert_whole(streams, texts)
    longest_s = max(max(stream.gaps_s) for stream in streams)
    silence_s = max(max(stream.silences_s) for stream in streams)
    fewest = min(stream.keep_alives for stream in streams)
    print(
        f"C8: {len(streams)}/{len(prompts)} streams equal the reference; longest pause {longest_s:.1f} s, at least"
        f" {fewest} keep-alives, longest silence {silence_s:.2f} s"
    )
    assert longest_s >= AWAY_S
    assert fewest >= AWAY_S // KEEP_ALIVE_S - 1
    assert silence_s < KEEP_ALIVE_S + MARGIN_S


def test_c9_the_only_last_stage_stays_away_and_the_clients_are_told_when_the_wait_is_over(
    made: Daemons, prompts: list[list[int]], texts: list[str]
) -> None:
    client = openai.OpenAI(base_url=f"http://{made.api}/v1", api_key="EMPTY", max_retries=0, timeout=120)
    with client, in_flight(made, prompts, NEW) as streams:
        theirs = client.completions.create(
            model="m", prompt=prompts[0], max_tokens=400, temperature=0, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(theirs))
        until(lambda: least(streams) >= 3, "the streams to get going")
        made.all["c"].kill()
        killed_s = time.monotonic()
        with pytest.raises(openai.APIError) as caught:
            list(theirs)
    assert caught.value.code == "pipeline_lost"
    for stream, text in zip(streams, texts, strict=True):
        assert stream.error is not None
        assert set(stream.error) == {"message", "type", "param", "code"}
        assert stream.error["code"] == "pipeline_lost"
        assert not stream.done
        assert text.startswith(stream.text)
    waited_s = [stream.ended_s - killed_s for stream in streams]
    print(f"C9: {len(streams)} streams and an openai client told pipeline_lost after {min(waited_s):.1f} to"
          f" {max(waited_s):.1f} s")  # fmt: skip
    assert FAILOVER_WAIT_S - MARGIN_S < min(waited_s)
    assert max(waited_s) < FAILOVER_WAIT_S + MARGIN_S
    made.restart("c")
    whole(made, len(CHAIN))
    with in_flight(made, prompts, NEW) as streams:
        pass
    assert_whole(streams, texts)


def test_c10_a_new_coordinator_finds_the_workers_loaded_and_rid_of_the_old_ones_requests(
    made: Daemons, prompts: list[list[int]], texts: list[str]
) -> None:
    epoch, before = made.get("/cluster")["epoch"], loaded(made)
    with in_flight(made, prompts, NEW) as streams:
        until(lambda: least(streams) >= 5, "the streams to get going")
        made.all["coordinator"].kill()
        killed_s = time.monotonic()
    assert not any(stream.done or stream.error for stream in streams)
    for name in CHAIN:
        until(lambda name=name: rid_of_everything(made.all[name]), f"{name} to free orphans", ORPHANS_S)  # type: ignore[misc]
    freed_s = time.monotonic() - killed_s
    began_s = time.monotonic()
    made.restart("coordinator")
    until(lambda: answers(made), "the API to answer")
    listens_s = time.monotonic()
    made.wait_ready(JOIN_RETRY_MAX_S + SLACK_S)
    ready_s = time.monotonic()
    whole(made, len(CHAIN))
    with in_flight(made, prompts, NEW) as streams:
        pass
    assert_whole(streams, texts)
    after = loaded(made)
    print(
        f"C10: {sum(after.values()) - sum(before.values())} bytes of weights read again, orphans freed within"
        f" {freed_s:.1f} s; ready {ready_s - began_s:.1f} s after the start of the process, {ready_s - listens_s:.1f} s"
        " after it answers"
    )
    assert made.get("/cluster")["epoch"] > epoch
    assert after == before


def rid_of_everything(worker: Daemon) -> bool:
    """Whether a worker says that it holds nothing. Asks it to say so again."""
    told = re.findall(r"snapshot .*?: (\d+) sequences, (\d+) tokens queued, (\d+) KV pages", worker.text)
    worker.signal(signal.SIGUSR1)
    time.sleep(0.05)
    return bool(told) and not any(map(int, told[-1]))


def answers(made: Daemons) -> bool:
    try:
        made.get("/healthz")
    except OSError:
        return False
    return True
