"""The real `openai` client against real daemons: texts, ids and log probabilities are those of `transformers`."""

import asyncio
import json
import math
import signal
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

import helixd
from tests.daemons import Daemons, byte_tokenizer, daemons
from tests.families import VOCAB
from tests.openai_shapes import (
    sse_payloads,
    validate_chat_chunk,
    validate_chat_response,
    validate_completion,
    validate_completion_chunk,
    validate_error,
    validate_model,
    validate_model_list,
)
from tests.served import NEW, PROMPTS, Say, chat_text, served_checkpoint

TOKENIZER = byte_tokenizer(VOCAB)
STAGES = {"a": (0, 3), "b": (3, 5), "c": (5, 6)}
ROUTE = "a[0, 3) -> b[3, 5) -> c[5, 6)"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return served_checkpoint(tmp_path_factory.mktemp("e2e") / "m")


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Iterator[Daemons]:
    with daemons(tmp_path_factory.mktemp("e2e-cluster")) as made:
        made.pinned_cluster(checkpoint, STAGES)
        made.wait_ready()
        yield made
        # Whatever the tests did, nothing may be left of it on any node.
        made.wait_idle()


@pytest.fixture
def cluster(running: Daemons) -> Iterator[Daemons]:
    yield running
    # Shown only where the test failed.
    print(running.tails())


@pytest.fixture
def say(checkpoint: Path) -> Say:
    return Say(checkpoint)


@pytest.fixture
def client(cluster: Daemons) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"http://{cluster.api}/v1", api_key="EMPTY", max_retries=0) as made:
        yield made


@pytest.fixture
def greedy() -> dict[str, Any]:
    return {"model": "m", "temperature": 0, "max_tokens": NEW, "extra_body": {"ignore_eos": True}}


def user(text: str) -> Any:
    return [{"role": "user", "content": text}]


# -- chat ------------------------------------------------------------------------------------------------------------


def test_a_chat_answer_is_the_references(client: openai.OpenAI, say: Say, greedy: dict[str, Any]) -> None:
    raw = client.chat.completions.with_raw_response.create(
        messages=user(PROMPTS[0]), **greedy, extra_headers={"x-request-id": "mine-1"}
    )
    validate_chat_response(raw.http_response.json())
    assert raw.headers["x-helixd-route"] == ROUTE
    assert raw.headers["x-helixd-retries"] == "0"
    assert raw.headers["x-request-id"] == "mine-1"
    answer = raw.parse()
    assert answer.choices[0].message.content == say.text(chat_text(PROMPTS[0]), NEW)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(chat_text(PROMPTS[0]).encode())
    assert answer.usage.completion_tokens == NEW
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + NEW


def test_a_chat_stream_is_the_references(client: openai.OpenAI, say: Say, greedy: dict[str, Any]) -> None:
    with client.chat.completions.with_raw_response.create(
        messages=user(PROMPTS[1]), stream=True, stream_options={"include_usage": True}, **greedy
    ).parse() as stream:
        chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == say.text(chat_text(PROMPTS[1]), NEW)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert not chunks[-1].choices
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == NEW
    assert all(chunk.usage is None for chunk in chunks[:-1])


async def test_many_async_streams_at_once(cluster: Daemons, say: Say, greedy: dict[str, Any]) -> None:
    prompts = PROMPTS * 5
    async with openai.AsyncOpenAI(base_url=f"http://{cluster.api}/v1", api_key="EMPTY", max_retries=0) as client:

        async def one(prompt: str) -> str:
            stream = await client.completions.create(prompt=prompt, stream=True, **greedy)
            return "".join([chunk.choices[0].text async for chunk in stream])

        texts = await asyncio.gather(*(one(prompt) for prompt in prompts))
    assert texts == [say.text(prompt, NEW) for prompt in prompts]


async def test_the_async_client_gets_whole_answers(cluster: Daemons, say: Say, greedy: dict[str, Any]) -> None:
    async with openai.AsyncOpenAI(base_url=f"http://{cluster.api}/v1", api_key="EMPTY", max_retries=0) as client:
        chat, legacy = await asyncio.gather(
            client.chat.completions.create(messages=user(PROMPTS[2]), **greedy),
            client.completions.create(prompt=PROMPTS[2], **greedy),
        )
    assert chat.choices[0].message.content == say.text(chat_text(PROMPTS[2]), NEW)
    assert legacy.choices[0].text == say.text(PROMPTS[2], NEW)


def test_chat_logprobs_are_the_references(client: openai.OpenAI, say: Say, greedy: dict[str, Any]) -> None:
    raw = client.chat.completions.with_raw_response.create(
        messages=user(PROMPTS[0]), logprobs=True, top_logprobs=4, **greedy
    )
    validate_chat_response(raw.http_response.json())
    logprobs = raw.parse().choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    wanted = say.reference(chat_text(PROMPTS[0]), NEW)
    table = torch.log_softmax(wanted.logits, -1)
    assert len(logprobs.content) == NEW
    for at, entry in enumerate(logprobs.content):
        assert math.isclose(entry.logprob, float(table[at, wanted.tokens[at]]), abs_tol=1e-3)
        best = table[at].topk(4).values
        assert torch.allclose(torch.tensor([top.logprob for top in entry.top_logprobs]), best, atol=1e-3)
        assert bytes(entry.bytes or []) == say.token_bytes(wanted.tokens[at])


# -- completions -----------------------------------------------------------------------------------------------------


def test_a_prompt_as_text_list_and_ids(client: openai.OpenAI, say: Say, greedy: dict[str, Any]) -> None:
    texts = [say.text(prompt, NEW) for prompt in PROMPTS]
    ids = [TOKENIZER.encode(prompt).ids for prompt in PROMPTS]
    for prompt, wanted in ((PROMPTS[0], texts[:1]), (PROMPTS, texts), (ids[0], texts[:1]), (ids, texts)):
        raw = client.completions.with_raw_response.create(prompt=prompt, **greedy)
        validate_completion(raw.http_response.json())
        assert [choice.text for choice in raw.parse().choices] == wanted
        assert [choice.index for choice in raw.parse().choices] == list(range(len(wanted)))


def test_echo_scores_the_prompt_as_the_reference_does(client: openai.OpenAI, say: Say) -> None:
    raw = client.completions.with_raw_response.create(
        model="m", prompt=PROMPTS[1], max_tokens=0, echo=True, logprobs=3, temperature=0
    )
    validate_completion(raw.http_response.json())
    choice = raw.parse().choices[0]
    assert choice.text == PROMPTS[1]
    assert choice.logprobs is not None
    given = choice.logprobs.token_logprobs
    assert given is not None
    assert given[0] is None
    assert torch.allclose(torch.tensor(given[1:]), say.prompt_logprobs(PROMPTS[1]), atol=1e-3)
    assert raw.parse().usage is not None
    assert raw.parse().usage.completion_tokens == 0


def test_echo_with_output_joins_both(client: openai.OpenAI, say: Say, greedy: dict[str, Any]) -> None:
    answer = client.completions.create(prompt=PROMPTS[0], echo=True, logprobs=0, **greedy)
    assert answer.choices[0].text == PROMPTS[0] + say.text(PROMPTS[0], NEW)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    assert len(logprobs.token_logprobs) == len(PROMPTS[0]) + NEW


def test_stop_strings_end_the_text_before_them(client: openai.OpenAI, say: Say, greedy: dict[str, Any]) -> None:
    whole = say.text(PROMPTS[0], NEW)
    at = len(whole) // 2
    stop = whole[at : at + 3]
    before = whole[: whole.index(stop)]
    answer = client.completions.create(prompt=PROMPTS[0], stop=["never seen", stop], **greedy)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (before, "stop")
    stream = client.completions.create(prompt=PROMPTS[0], stop=stop, stream=True, **greedy)
    assert "".join(chunk.choices[0].text for chunk in stream) == before


def test_the_models_end_token_ends_a_text(client: openai.OpenAI, say: Say, greedy: dict[str, Any]) -> None:
    tokens = say.reference(PROMPTS[0], NEW).tokens
    end = tokens[NEW // 2]
    body = {"extra_body": {"stop_token_ids": [end], "ignore_eos": True}}
    answer = client.completions.create(**{**greedy, **body}, prompt=PROMPTS[0])
    length = tokens.index(end)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == length + 1
    assert answer.choices[0].text == say.decode(tokens[:length])


def test_seeds_repeat_and_choices_differ(client: openai.OpenAI) -> None:
    def draw(seed: int) -> list[str]:
        raw = client.chat.completions.with_raw_response.create(
            model="m", messages=user("numbers"), n=4, seed=seed, temperature=1.0, top_p=0.95, max_completion_tokens=24,
            presence_penalty=0.5, frequency_penalty=0.3, logit_bias={"7": -100}, user="u", metadata={"a": "b"},
        )  # fmt: skip
        validate_chat_response(raw.http_response.json())
        answer = raw.parse()
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 4 * 24
        return [choice.message.content or "" for choice in answer.choices]

    first = draw(3)
    assert draw(3) == first
    assert len(set(first)) == 4
    assert draw(4) != first


# -- what is on the wire ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "fields", "validate"),
    [
        ("/v1/chat/completions", {"messages": user("stream"), "logprobs": True, "top_logprobs": 2}, "chat"),
        ("/v1/completions", {"prompt": ["stream", "more"], "logprobs": 2, "echo": True}, "legacy"),
    ],
)
def test_every_chunk_of_a_stream_has_openais_shape(
    cluster: Daemons, path: str, fields: dict[str, Any], validate: str
) -> None:
    body = {
        "model": "m", "n": 2, "seed": 1, "max_tokens": 20, "stream": True, "stream_options": {"include_usage": True},
        **fields,
    }  # fmt: skip
    request = urllib.request.Request(
        f"http://{cluster.api}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert answer.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        assert answer.headers["x-helixd-route"] == ROUTE
        *payloads, last = sse_payloads(answer.read())
    assert last == "[DONE]"
    check = validate_chat_chunk if validate == "chat" else validate_completion_chunk
    for payload in payloads:
        check(json.loads(payload))
    choices = 2 if validate == "chat" else 4
    assert json.loads(payloads[-1])["usage"]["completion_tokens"] == choices * 20


def test_curl_streams(cluster: Daemons, say: Say) -> None:
    body = {"model": "m", "prompt": PROMPTS[0], "temperature": 0, "max_tokens": NEW, "stream": True, "ignore_eos": True}
    done = subprocess.run(
        ["curl", "-sS", "-N", "--max-time", "60", f"http://{cluster.api}/v1/completions",
         "-H", "Content-Type: application/json", "-d", json.dumps(body)],
        capture_output=True, check=True,
    )  # fmt: skip
    *payloads, last = sse_payloads(done.stdout)
    assert last == "[DONE]"
    text = "".join(json.loads(payload)["choices"][0]["text"] for payload in payloads)
    assert text == say.text(PROMPTS[0], NEW)


# -- the rest of the surface -----------------------------------------------------------------------------------------


def test_models(client: openai.OpenAI) -> None:
    raw = client.models.with_raw_response.list()
    validate_model_list(raw.http_response.json())
    assert [model.id for model in raw.parse().data] == ["m"]
    one = client.models.with_raw_response.retrieve("m")
    validate_model(one.http_response.json())
    with pytest.raises(openai.NotFoundError) as missing:
        client.models.retrieve("other")
    validate_error({"error": missing.value.body})


def test_tokens_there_and_back(cluster: Daemons) -> None:
    text = "naïve ☃ text"
    ids = cluster.post("/tokenize", {"model": "m", "prompt": text})
    assert ids["tokens"] == TOKENIZER.encode(text).ids
    assert ids["count"] == len(text.encode())
    assert cluster.post("/detokenize", {"model": "m", "tokens": ids["tokens"]})["prompt"] == text


def test_the_clusters_own_pages(cluster: Daemons) -> None:
    assert cluster.get("/readyz")["ready"] is True
    assert cluster.get("/healthz")
    assert cluster.get("/version")["version"] == helixd.__version__
    view = cluster.get("/cluster")
    assert {node["id"]: node["layers"] for node in view["nodes"]} == {name: list(span) for name, span in STAGES.items()}
    assert {node["confirmed"]["state"] for node in view["nodes"]} == {"ready"}
    assert view["plan"]["placement"] == {name: list(span) for name, span in STAGES.items()}
    pairs = {(link["src"], link["dst"]) for link in view["links"] if link["error"] is None}
    assert {("a", "b"), ("b", "c")} <= pairs
    with urllib.request.urlopen(f"http://{cluster.api}/metrics", timeout=10) as answer:
        assert b"helixd_" in answer.read()


# -- one machine -----------------------------------------------------------------------------------------------------


def test_without_a_role_one_process_serves(tmp_path: Path, checkpoint: Path, say: Say, greedy: dict[str, Any]) -> None:
    with daemons(tmp_path) as made:
        alone = made.alone(checkpoint)
        made.wait_ready()
        with openai.OpenAI(base_url=f"http://{made.api}/v1", api_key="EMPTY", max_retries=0) as client:
            answer = client.completions.create(prompt=PROMPTS, **greedy)
            assert [choice.text for choice in answer.choices] == [say.text(prompt, NEW) for prompt in PROMPTS]
            made.wait_idle()
            # A daemon that is told to stop lets what runs come to its end.
            with client.completions.create(prompt=PROMPTS[0], stream=True, **greedy) as stream:
                chunks = iter(stream)
                text = next(chunks).choices[0].text
                alone.signal(signal.SIGTERM)
                text += "".join(chunk.choices[0].text for chunk in chunks)
            assert text == say.text(PROMPTS[0], NEW)
        assert alone.wait_exit() == 0
        assert "Traceback" not in alone.text
