"""Workers are killed, stopped, restarted under load: the texts are those of an undisturbed run, and nothing leaks."""

import json
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from tests.daemons import Daemons, Stream, add_tokenizer, completion, daemons
from tests.families import exact_checkpoint, reference_tokens

pytestmark = pytest.mark.chaos

NEW = 96
PROMPTS = [[number * 7 % 90 + 35 + at for at in range(4 + 5 * number)] for number in range(8)]
STAGES = {"a1": (0, 2), "a2": (0, 2), "b1": (2, 4), "b2": (2, 4), "c1": (4, 6), "c2": (4, 6)}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chaos") / "m"
    exact_checkpoint("llama2", path, PROMPTS[:4], NEW)
    add_tokenizer(path)
    return path


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Daemons]:
    with daemons(tmp_path) as made:
        yield made


def start(made: Daemons, checkpoint: Path, stages: dict[str, tuple[int, int]], *arguments: str) -> None:
    config = made.home / "cluster.toml"
    pins = "".join(f'[planner.pins."{name}"]\nrange = [{a}, {b}]\n' for name, (a, b) in stages.items())
    config.write_text(f"[planner]\nwait_for_nodes = {len(stages)}\n{pins}")
    made.coordinator(checkpoint, "--config", str(config), *arguments)
    for name in stages:
        made.worker(name, "8MiB")
    made.wait_ready()


def expected(checkpoint: Path, prompt: list[int]) -> str:
    ids = reference_tokens(checkpoint, prompt, NEW)
    return str(Tokenizer.from_file(str(checkpoint / "tokenizer.json")).decode(ids))


def together(made: Daemons, prompts: list[list[int]], **fields: object) -> list[Stream]:
    return [completion(made, prompt, NEW, **fields) for prompt in prompts]


def finish(streams: list[Stream]) -> None:
    with ThreadPoolExecutor(len(streams)) as threads:
        list(threads.map(lambda stream: stream.read(), streams))


def assert_whole(streams: list[Stream], texts: list[str]) -> None:
    for stream, text in zip(streams, texts, strict=True):
        assert stream.error is None
        assert stream.done
        assert stream.reason == "length"
        assert stream.text == text


def test_sigkill_of_middle_workers_at_several_moments(cluster: Daemons, checkpoint: Path) -> None:
    start(cluster, checkpoint, STAGES)
    prompts = PROMPTS[:4] * 2
    texts = [expected(checkpoint, prompt) for prompt in prompts]
    for after in (1, 20, 80):
        streams = together(cluster, prompts)
        streams[0].read(after)
        used = {hop.split("[")[0] for stream in streams for hop in stream.route.split(" -> ")}
        victim = "b1" if "b1" in used else "b2"
        cluster.all[victim].kill()
        finish(streams)
        assert_whole(streams, texts)
        cluster.restart(victim)
        cluster.wait(lambda: len(cluster.get("/cluster")["nodes"]) == 6, "the killed worker to come back")
        cluster.wait(
            lambda: all((n["confirmed"] or {}).get("state") == "ready" for n in cluster.get("/cluster")["nodes"]),
            "all six nodes to serve again",
        )
        cluster.wait_idle()
    assert cluster.get("/cluster")["requests"]["failovers"] > 0


def test_seeded_sampling_survives_a_kill(cluster: Daemons, checkpoint: Path) -> None:
    start(cluster, checkpoint, STAGES)
    fields: dict[str, object] = {"temperature": 1.0, "seed": 11, "top_p": 0.9, "frequency_penalty": 0.4}
    calm = together(cluster, PROMPTS[:3], **fields)
    finish(calm)
    streams = together(cluster, PROMPTS[:3], **fields)
    streams[0].read(10)
    cluster.all["c1"].kill()
    finish(streams)
    assert_whole(streams, [stream.text for stream in calm])


def test_a_stopped_worker_is_left_behind_and_comes_back(cluster: Daemons, checkpoint: Path) -> None:
    start(cluster, checkpoint, STAGES)
    texts = [expected(checkpoint, prompt) for prompt in PROMPTS[:4]]
    streams = together(cluster, PROMPTS[:4])
    streams[0].read(5)
    cluster.all["b1"].signal(signal.SIGSTOP)
    finish(streams)
    assert_whole(streams, texts)
    cluster.all["b1"].signal(signal.SIGCONT)
    cluster.wait(lambda: len(cluster.get("/cluster")["nodes"]) == 6, "the stopped worker to rejoin")
    cluster.wait_idle()
    again = together(cluster, PROMPTS[:4])
    finish(again)
    assert_whole(again, texts)


def test_without_a_replica_the_client_is_told(cluster: Daemons, checkpoint: Path) -> None:
    stages = {"a": (0, 2), "b": (2, 4), "c": (4, 6)}
    start(cluster, checkpoint, stages, "--set", "cluster.timers.failover_wait=2s")
    stream = completion(cluster, PROMPTS[0], NEW)
    stream.read(3)
    cluster.all["b"].kill()
    stream.read()
    assert stream.error is not None
    assert stream.error["code"] == "pipeline_lost"
    assert set(stream.error) == {"message", "type", "param", "code"}
    assert not stream.done
    cluster.restart("b")
    cluster.wait_ready()
    healed = completion(cluster, PROMPTS[0], NEW).read()
    assert_whole([healed], [expected(checkpoint, PROMPTS[0])])
    cluster.wait_idle()


def test_the_only_pipeline_comes_back_in_time(cluster: Daemons, checkpoint: Path) -> None:
    stages = {"a": (0, 2), "b": (2, 4), "c": (4, 6)}
    start(cluster, checkpoint, stages)
    stream = completion(cluster, PROMPTS[1], NEW)
    stream.read(30)
    cluster.all["c"].kill()
    cluster.restart("c")
    stream.read()
    assert_whole([stream], [expected(checkpoint, PROMPTS[1])])
    cluster.wait_idle()


def test_clients_that_leave_free_everything(cluster: Daemons, checkpoint: Path) -> None:
    start(cluster, checkpoint, {"a": (0, 3), "b": (3, 6)})
    streams = [completion(cluster, prompt, 400) for prompt in PROMPTS]
    for number, stream in enumerate(streams):
        stream.read(1 + number)
        stream.close()
    cluster.wait_idle()
    log = json.dumps(cluster.get("/cluster")["requests"])
    assert '"running": 0' in log
