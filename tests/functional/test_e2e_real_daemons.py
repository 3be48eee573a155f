"""Real daemons, the real `openai` client, and everything that may be wrong with a request or a worker."""

import asyncio
import json
import signal
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest

from tests.daemons import Daemons, add_tokenizer, daemons
from tests.families import exact_checkpoint, make_checkpoint, reference_tokens
from tests.openai_shapes import (
    validate_chat_chunk,
    validate_chat_response,
    validate_completion,
    validate_completion_chunk,
    validate_error,
    validate_model_list,
)

PROMPT = [3, 17, 5, 40, 8, 22, 9]
MESSAGES: list[Any] = [{"role": "user", "content": "say something"}]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("e2e") / "m"
    exact_checkpoint("llama2", path, [PROMPT], 24)
    add_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def cluster(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemons]:
    with daemons(tmp_path_factory.mktemp("daemons")) as made:
        made.coordinator(checkpoint, "--set", "planner.wait_for_nodes=3")
        for name, memory in (("w1", "500KiB"), ("w2", "700KiB"), ("w3", "900KiB")):
            made.worker(name, memory)
        made.wait_ready()
        yield made
        made.wait_idle()


@pytest.fixture
def client(cluster: Daemons) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://{cluster.api}/v1", api_key="none", max_retries=0)


def post(made: Daemons, path: str, data: bytes, kind: str = "application/json") -> tuple[int, Any]:
    request = urllib.request.Request(f"http://{made.api}{path}", data, {"Content-Type": kind})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def test_completion_equals_the_reference(client: openai.OpenAI, cluster: Daemons, checkpoint: Path) -> None:
    raw = client.completions.with_raw_response.create(
        model="m", prompt=PROMPT, max_tokens=24, temperature=0, logprobs=0, extra_body={"ignore_eos": True}
    )
    validate_completion(json.loads(raw.text))
    assert raw.headers["x-helixd-retries"] == "0"
    assert raw.headers["x-helixd-route"].count("->") >= 1
    from tokenizers import Tokenizer

    text = Tokenizer.from_file(str(checkpoint / "tokenizer.json")).decode(reference_tokens(checkpoint, PROMPT, 24))
    parsed = raw.parse()
    assert parsed.choices[0].text == text
    assert parsed.usage is not None
    assert parsed.usage.completion_tokens == 24


def test_chat_streams_and_counts(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(
        model="m", messages=MESSAGES, max_completion_tokens=12, seed=5, n=2, logprobs=True, top_logprobs=3
    )
    validate_chat_response(whole.model_dump(exclude_unset=True))
    chunks = list(
        client.chat.completions.create(
            model="m", messages=MESSAGES, max_completion_tokens=12, seed=5, n=2, logprobs=True, top_logprobs=3,
            stream=True, stream_options={"include_usage": True},
        )
    )  # fmt: skip
    for chunk in chunks:
        validate_chat_chunk(chunk.model_dump(exclude_unset=True))
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].usage is not None
    assert chunks[-1].usage == whole.usage
    for index in (0, 1):
        streamed = "".join(c.delta.content or "" for chunk in chunks for c in chunk.choices if c.index == index)
        assert streamed == whole.choices[index].message.content


def test_echo_scores_the_prompt(client: openai.OpenAI) -> None:
    scored = client.completions.create(model="m", prompt="abcdef", max_tokens=1, echo=True, logprobs=2)
    validate_completion(scored.model_dump(exclude_unset=True))
    logprobs = scored.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.token_logprobs[0] is None
    assert len(logprobs.token_logprobs) == 7


async def test_async_streaming(cluster: Daemons) -> None:
    async with openai.AsyncOpenAI(base_url=f"http://{cluster.api}/v1", api_key="none") as client:
        streams = await asyncio.gather(
            *(
                client.completions.create(model="m", prompt=[PROMPT, [7, 8, 9]], max_tokens=8, stream=True)
                for _ in range(6)
            )
        )
        for stream in streams:
            seen = set()
            async for chunk in stream:
                validate_completion_chunk(chunk.model_dump(exclude_unset=True))
                seen |= {choice.index for choice in chunk.choices}
            assert seen == {0, 1}


def test_models_health_and_cluster(client: openai.OpenAI, cluster: Daemons) -> None:
    listed = client.models.list()
    validate_model_list(json.loads(listed.model_dump_json()))
    assert client.models.retrieve("m").id == "m"
    assert cluster.get("/readyz")["ready"] is True
    assert cluster.get("/healthz") is not None
    view = cluster.get("/cluster")
    assert {node["id"] for node in view["nodes"]} == {"w1", "w2", "w3"}
    assert all(node["confirmed"]["state"] == "ready" for node in view["nodes"] if node["layers"])


def test_curl_streams(cluster: Daemons) -> None:
    body = json.dumps({"model": "m", "messages": MESSAGES, "max_tokens": 5, "stream": True})
    told = subprocess.run(
        ["curl", "-sS", "-N", f"http://{cluster.api}/v1/chat/completions", "-H", "Content-Type: application/json",
         "-d", body],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert told.stdout.rstrip().endswith("data: [DONE]")


@pytest.mark.parametrize(
    ("path", "data", "status", "param"),
    [
        ("/v1/chat/completions", b"{", 400, None),
        ("/v1/chat/completions", b'{"model": "m", "messages": "\xff"}', 400, None),
        ("/v1/chat/completions", b'{"model": "m", "messages": []}', 400, "messages"),
        ("/v1/chat/completions", b'{"model": "other", "messages": [{"role": "user", "content": "x"}]}', 404, "model"),
        ("/v1/completions", b'{"model": "m", "prompt": "x", "max_tokens": "many"}', 400, "max_tokens"),
        ("/v1/completions", b'{"model": "m", "prompt": [99999999]}', 400, "prompt"),
        ("/v1/completions", json.dumps({"model": "m", "prompt": [1] * 5000}).encode(), 400, None),
        ("/v1/completions", b" " * (5 << 20), 413, None),
        ("/v1/nothing", b"{}", 404, None),
    ],
)
def test_bad_requests_get_a_clear_answer(
    cluster: Daemons, path: str, data: bytes, status: int, param: str | None
) -> None:
    code, answer = post(cluster, path, data)
    assert code == status
    validate_error(answer)
    if param is not None:
        assert param in answer["error"]["param"]


async def test_garbage_on_the_peer_port_hurts_nobody(cluster: Daemons, client: openai.OpenAI) -> None:
    host, port = cluster.peers.split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"\x00\xff garbage that is no HTTP at all\r\n\r\n")
    await writer.drain()
    async with aiohttp.ClientSession() as session:
        for message in (b"", b"\xc1" * 600, b"x" * 4000):
            async with session.ws_connect(f"http://{cluster.peers}/peer") as socket:
                await socket.send_bytes(message)
                await socket.close()
    writer.close()
    assert (await asyncio.to_thread(post, cluster, "/v1/completions", b'{"model":"m","prompt":[1,2],"max_tokens":2}'))[
        0
    ] == 200


def test_a_worker_with_another_model_is_refused(cluster: Daemons, tmp_path: Path) -> None:
    make_checkpoint("llama2", tmp_path / "other", 99)
    other = json.loads((tmp_path / "other" / "config.json").read_text()) | {"rope_theta": 5000.0}
    (tmp_path / "other" / "config.json").write_text(json.dumps(other))
    add_tokenizer(tmp_path / "other")
    stranger = cluster.worker("stranger", "1MiB", "--model", str(tmp_path / "other"))
    assert stranger.process.wait(60) == 77
    assert "fingerprint" in stranger.text
    del cluster.all["stranger"]


def test_a_worker_too_small_for_a_layer_stays_idle_and_says_why(cluster: Daemons) -> None:
    cluster.worker("tiny", "4KiB")
    cluster.wait(lambda: any(node["id"] == "tiny" for node in cluster.get("/cluster")["nodes"]), "the tiny worker")
    node = next(node for node in cluster.get("/cluster")["nodes"] if node["id"] == "tiny")
    assert node["layers"] is None
    assert post(cluster, "/v1/completions", b'{"model":"m","prompt":[1,2],"max_tokens":2}')[0] == 200
    cluster.all.pop("tiny").kill()


def test_a_model_too_large_says_what_is_missing_and_serves_once_it_fits(checkpoint: Path, tmp_path: Path) -> None:
    with daemons(tmp_path) as made:
        made.coordinator(checkpoint)
        made.worker("small", "200KiB")

        def refused() -> bool:
            code, answer = post(made, "/v1/completions", b'{"model":"m","prompt":[1,2],"max_tokens":2}')
            return (
                code == 503
                and answer["error"]["code"] == "no_feasible_placement"
                and "needs" in answer["error"]["message"]
            )

        made.wait(refused, "the refusal that names the sum")
        assert len(made.get("/cluster")["nodes"]) == 1
        made.worker("large", "4MiB")
        made.wait_ready()
        assert post(made, "/v1/completions", b'{"model":"m","prompt":[1,2],"max_tokens":2}')[0] == 200


def test_secrets_keep_strangers_out(checkpoint: Path, tmp_path: Path) -> None:
    for name, text in (("right", "r" * 40), ("wrong", "w" * 40)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o600)
    with daemons(tmp_path) as made:
        made.coordinator(checkpoint, "--secret-file", str(tmp_path / "right"))
        made.worker("friend", "4MiB", "--secret-file", str(tmp_path / "right"))
        stranger = made.worker("stranger", "4MiB", "--secret-file", str(tmp_path / "wrong"))
        assert stranger.process.wait(60) == 77
        del made.all["stranger"]
        made.wait_ready()
        assert [node["id"] for node in made.get("/cluster")["nodes"]] == ["friend"]
        open_port = made.start(
            "open", "--role", "worker", "--coordinator", made.peers, "--peer-listen", "0.0.0.0:0", "--device", "cpu"
        )  # fmt: skip
        assert open_port.process.wait(60) == 78
        assert "secret" in open_port.text
        del made.all["open"]


def test_one_machine_without_a_role_and_sigterm(checkpoint: Path, tmp_path: Path) -> None:
    with daemons(tmp_path) as made:
        made.api = "127.0.0.1:0"
        alone = made.start(
            "alone", "--model", str(checkpoint), "--listen", made.api, "--peer-listen", "127.0.0.1:0",
            "--memory", "8MiB", "--device", "cpu",
        )  # fmt: skip
        made.wait(lambda: "api=http://" in alone.text, "the address in the log")
        made.api = alone.text.split("api=http://")[1].split()[0]
        made.wait_ready()
        code, answer = post(made, "/v1/completions", json.dumps(
            {"model": "m", "prompt": PROMPT, "max_tokens": 4, "temperature": 0}).encode())  # fmt: skip
        assert code == 200
        validate_completion(answer)
        alone.signal(signal.SIGTERM)
        assert alone.process.wait(30) == 0
        made.all.clear()
