"""Real processes killed and stopped under load: texts are those of an undisturbed run, nothing leaks, all come back.

The oracle is `transformers`: its greedy tokens do not depend on the order of sums, since the checkpoint's best logits
lead clearly at every position.
"""

import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import openai
import pytest

from tests.chaos.streams import assert_whole, least, most, until, used, whole
from tests.chaos.streams import in_flight as streams_in_flight
from tests.daemons import Daemons, Stream, add_tokenizer, byte_tokenizer, daemons
from tests.families import VOCAB, exact_checkpoint, reference_tokens

pytestmark = pytest.mark.chaos

NEW = 96
SEED = 1
PROMPTS = [[number * 7 % 90 + 35 + at for at in range(4 + 5 * number)] for number in range(8)]
PAIRS = {"a1": (0, 2), "a2": (0, 2), "b1": (2, 4), "b2": (2, 4), "c1": (4, 6), "c2": (4, 6)}
# Two rows a step make the prompts' prefill long enough to be hit.
SLOW_PREFILL = ("--set", "engine.prefill_chunk_tokens=2")
SAMPLED: dict[str, object] = {"temperature": 1.0, "seed": 11, "top_p": 0.9, "frequency_penalty": 0.4}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chaos") / "m"
    exact_checkpoint("llama2", path, PROMPTS, NEW, SEED)
    add_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def texts(checkpoint: Path) -> list[str]:
    """What the reference answers to PROMPTS."""
    tokenizer = byte_tokenizer(VOCAB)
    return [str(tokenizer.decode(reference_tokens(checkpoint, prompt, NEW))) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def running_pairs(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Iterator[Daemons]:
    with daemons(tmp_path_factory.mktemp("pairs")) as made:
        made.pinned_cluster(
            checkpoint, PAIRS, *SLOW_PREFILL, "--set", "cluster.timers.failover_wait=3s",
            "--set", "cluster.timers.dead_after=2s",
        )  # fmt: skip
        made.wait_ready()
        yield made


@pytest.fixture
def pairs(running_pairs: Daemons) -> Iterator[Daemons]:
    """Three stages, two replicas of each, all up; afterwards nothing is left of any request on any of them."""
    whole(running_pairs, len(PAIRS))
    yield running_pairs
    print(running_pairs.tails())
    running_pairs.wait_idle()


def in_flight(made: Daemons, **fields: object) -> AbstractContextManager[list[Stream]]:
    """A stream per prompt."""
    return streams_in_flight(made, PROMPTS, NEW, **fields)


@pytest.mark.parametrize(
    ("stage", "moment"),
    [
        ("b", lambda streams: True),
        ("b", lambda streams: least(streams) >= 3),
        ("b", lambda streams: most(streams) >= NEW * 3 // 4),
        ("a", lambda streams: most(streams) >= 10),
        ("c", lambda streams: least(streams) >= 10),
    ],
    ids=["middle in prefill", "middle early", "middle late", "first", "last"],
)
def test_a_killed_worker_is_noticed_by_no_client(
    pairs: Daemons, texts: list[str], stage: str, moment: Callable[[list[Stream]], bool]
) -> None:
    failovers = pairs.get("/cluster")["requests"]["failovers"]
    with in_flight(pairs) as streams:
        until(lambda: moment(streams), "the moment of the kill")
        if stage == "b" and least(streams) < 3:
            assert least(streams) == 0, "the kill was to hit a prefill"
        victim = used(streams, (f"{stage}1", f"{stage}2"))
        pairs.all[victim].kill()
    assert_whole(streams, texts)
    assert pairs.get("/cluster")["requests"]["failovers"] > failovers
    pairs.wait_idle()
    pairs.restart(victim)


def test_a_seeded_sample_is_the_same_with_a_kill_in_it(pairs: Daemons) -> None:
    with in_flight(pairs, **SAMPLED) as calm:
        pass
    with in_flight(pairs, **SAMPLED) as streams:
        until(lambda: least(streams) >= 10, "the streams to get going")
        victim = used(streams, ("c1", "c2"))
        pairs.all[victim].kill()
    assert_whole(streams, [stream.text for stream in calm])
    assert len({stream.text for stream in calm}) == len(PROMPTS)
    pairs.restart(victim)


def test_two_stages_lose_a_worker_at_once(pairs: Daemons, texts: list[str]) -> None:
    with in_flight(pairs) as streams:
        until(lambda: least(streams) >= 5, "the streams to get going")
        victims = [used(streams, ("a1", "a2")), used(streams, ("c1", "c2"))]
        for victim in victims:
            pairs.all[victim].kill()
    assert_whole(streams, texts)
    for victim in victims:
        pairs.restart(victim)


def test_a_stopped_worker_is_left_behind_and_comes_back(pairs: Daemons, texts: list[str]) -> None:
    with in_flight(pairs) as streams:
        until(lambda: least(streams) >= 5, "the streams to get going")
        victim = used(streams, ("b1", "b2"))
        pairs.all[victim].signal(signal.SIGSTOP)
    assert_whole(streams, texts)
    assert {node["id"] for node in pairs.get("/cluster")["nodes"]} == set(PAIRS) - {victim}
    # It wakes amid other streams, with rows and tokens to send that nobody waits for any more.
    with in_flight(pairs) as streams:
        until(lambda: least(streams) >= 2, "the streams to get going")
        pairs.all[victim].signal(signal.SIGCONT)
    assert_whole(streams, texts)
    whole(pairs, len(PAIRS))
    with in_flight(pairs) as streams:
        pass
    assert_whole(streams, texts)


def test_without_a_replica_the_client_is_told(pairs: Daemons, texts: list[str]) -> None:
    client = openai.OpenAI(base_url=f"http://{pairs.api}/v1", api_key="EMPTY", max_retries=0, timeout=60)
    with client:
        with in_flight(pairs) as streams:
            theirs = client.completions.create(
                model="m", prompt=PROMPTS[0], max_tokens=NEW, temperature=0, stream=True,
                extra_body={"ignore_eos": True},
            )  # fmt: skip
            next(iter(theirs))
            until(lambda: least(streams) >= 3, "the streams to get going")
            for victim in ("b1", "b2"):
                pairs.all[victim].kill()
            with pytest.raises(openai.APIError) as caught:
                list(theirs)
        assert caught.value.code == "pipeline_lost"
        assert pairs.get("/cluster")["ready"]["ready"] is False
        with pytest.raises(openai.InternalServerError) as refused:
            client.completions.create(model="m", prompt=PROMPTS[0])
    for stream, text in zip(streams, texts, strict=True):
        assert stream.error is not None
        assert set(stream.error) == {"message", "type", "param", "code"}
        assert stream.error["code"] == "pipeline_lost"
        assert not stream.done
        assert text.startswith(stream.text)
    assert refused.value.code == "pipeline_lost"
    pairs.wait_idle()
    for victim in ("b1", "b2"):
        pairs.restart(victim)
    whole(pairs, len(PAIRS))
    with in_flight(pairs) as streams:
        pass
    assert_whole(streams, texts)
