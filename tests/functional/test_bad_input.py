"""What is wrong is answered clearly to who caused it, over HTTP and on the peer port, and everybody else goes on."""

import asyncio
import json
import math
import socket
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from helixd.ids import Incarnation, PeerId
from helixd.plan.cluster.spec import COORDINATOR
from helixd.protocol import messages as m
from helixd.protocol import versions
from helixd.protocol.codec import from_frame, to_frame
from helixd.wire.endpoint import Endpoint
from helixd.wire.errors import AuthRejected, CloseCode
from helixd.wire.handshake import Hello, Purpose
from helixd.wire.link import Frame, Link
from helixd.wire.options import WireOptions
from helixd.wire.peers import PeerIdentity
from tests.daemons import Daemon, Daemons, Stream, add_tokenizer, daemons
from tests.families import make_checkpoint
from tests.openai_shapes import validate_error
from tests.served import NEW, PROMPTS, Say, served_checkpoint

CONTEXT_TOKENS = 300
SECRET = "right" * 8
CHAT = "/v1/chat/completions"
LEGACY = "/v1/completions"
SHORT = 16
GREEDY: dict[str, object] = {"model": "m", "stream": True}
HI = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return served_checkpoint(tmp_path_factory.mktemp("bad") / "m")


def secret_file(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o600)
    return path


@dataclass(slots=True)
class Guarded:
    """A serving cluster with a secret, and workers that must not get in."""

    daemons: Daemons
    unwelcome: dict[str, Daemon] = field(default_factory=dict)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Iterator[Guarded]:
    home = tmp_path_factory.mktemp("guarded")
    right, wrong = secret_file(home / "right", SECRET), secret_file(home / "wrong", "wrong" * 8)
    other = home / "other"
    make_checkpoint("qwen2", other, 99)
    add_tokenizer(other)
    with daemons(home) as made:
        made.pinned_cluster(
            checkpoint, {"a": (0, 3), "b": (3, 6)}, "--secret-file", str(right),
            "--set", f"model.max_context_tokens={CONTEXT_TOKENS}", worker=("--secret-file", str(right)),
            excluded=("liar",),
        )  # fmt: skip
        made.wait_ready()
        found = Guarded(made)
        for name, words in {
            "wrong-secret": ("--secret-file", str(wrong)),
            "other-model": ("--secret-file", str(right), "--model", str(other)),
            "twin": ("--secret-file", str(right), "--set", "node.id=a"),
        }.items():
            found.unwelcome[name] = made.worker(name, "8MiB", *words)
            del made.all[name]
        made.worker("tiny", "4KiB", "--secret-file", str(right))
        try:
            yield found
            made.wait_idle()
        finally:
            for daemon in found.unwelcome.values():
                daemon.kill()


@pytest.fixture
def cluster(guarded: Guarded, checkpoint: Path) -> Iterator[Daemons]:
    """The cluster. A stream that is under way when the test begins, and one after it, are as if nothing happened."""
    made = guarded.daemons
    body = {**GREEDY, "prompt": PROMPTS[1], "max_tokens": SHORT}
    bystander = Stream(made, body)
    yield made
    print(made.tails())
    text = Say(checkpoint).text(PROMPTS[1], SHORT)
    for stream in (bystander, Stream(made, body)):
        assert stream.read().text == text
        assert stream.done


def encoded(body: Any) -> bytes:
    return body if isinstance(body, bytes) else json.dumps(body).encode()


def post(made: Daemons, path: str, data: bytes, kind: str = "application/json") -> tuple[int, Any]:
    request = urllib.request.Request(f"http://{made.api}{path}", data, {"Content-Type": kind})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


# -- over HTTP -------------------------------------------------------------------------------------------------------


BAD: list[tuple[str, Any, int, str | None, str | None]] = [
    (CHAT, b"{", 400, None, None),
    (CHAT, b"", 400, None, None),
    (CHAT, b"[]", 400, None, None),
    (CHAT, b'{"model": "m", "messages": "\xff"}', 400, None, None),
    (CHAT, b"[" * 100_000, 400, None, None),
    (CHAT, {"model": "m"}, 400, None, "messages"),
    (CHAT, {"model": "m", "messages": []}, 400, None, "messages"),
    (CHAT, {"model": "m", "messages": [{"role": "user"}]}, 400, None, "messages"),
    (CHAT, {"model": "m", "messages": [{"role": "pirate", "content": "x"}]}, 400, None, "messages"),
    (CHAT, {"model": "m", "messages": HI, "temperature": "hot"}, 400, None, "temperature"),
    (CHAT, {"model": "m", "messages": HI, "n": 0}, 400, None, "n"),
    (CHAT, {"model": "m", "messages": HI, "stream": "yes"}, 400, None, "stream"),
    (CHAT, {"messages": HI}, 400, None, "model"),
    (CHAT, {"model": "other", "messages": HI}, 404, "model_not_found", "model"),
    (CHAT, {"model": "m", "messages": [{"role": "user", "content": "x" * CONTEXT_TOKENS}]}, 400,
     "context_length_exceeded", "messages"),
    (LEGACY, {"model": "m", "prompt": "x", "max_tokens": "many"}, 400, None, "max_tokens"),
    (LEGACY, {"model": "m", "prompt": "x", "max_tokens": -1}, 400, None, "max_tokens"),
    (LEGACY, {"model": "m", "prompt": []}, 400, None, "prompt"),
    (LEGACY, {"model": "m", "prompt": [99999999]}, 400, None, "prompt"),
    (LEGACY, {"model": "m", "prompt": [-1]}, 400, None, "prompt"),
    (LEGACY, {"model": "m", "prompt": "\ud800"}, 400, None, None),
    (LEGACY, {"model": "m", "prompt": [1] * CONTEXT_TOKENS}, 400, "context_length_exceeded", "prompt"),
    (LEGACY, {"model": "m", "prompt": "x", "logit_bias": {"seven": 1}}, 400, None, "logit_bias"),
    (LEGACY, b" " * (5 << 20), 413, None, None),
    ("/v1/nothing", {}, 404, None, None),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "status", "code", "param"), BAD)
def test_a_bad_request_gets_an_answer_that_names_what_is_wrong(
    guarded: Guarded, path: str, body: Any, status: int, code: str | None, param: str | None
) -> None:
    answered, answer = post(guarded.daemons, path, encoded(body))
    validate_error(answer)
    assert answered == status, answer
    assert answer["error"]["message"]
    if code is not None:
        assert answer["error"]["code"] == code
    if param is not None:
        assert answer["error"]["param"].startswith(param)


def test_streams_flow_on_among_bad_requests(cluster: Daemons, checkpoint: Path) -> None:
    streams = [Stream(cluster, {**GREEDY, "prompt": prompt, "max_tokens": NEW}) for prompt in PROMPTS]
    for path, body, status, _, _ in BAD:
        assert post(cluster, path, encoded(body))[0] == status
    assert [stream.read().text for stream in streams] == [Say(checkpoint).text(prompt, NEW) for prompt in PROMPTS]


def test_a_huge_body_without_a_length_is_cut_off(cluster: Daemons) -> None:
    host, port = cluster.api.split(":")
    piece = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    sent = 0
    with socket.create_connection((host, int(port)), timeout=20) as raw:
        raw.sendall(
            f"POST {LEGACY} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            "Transfer-Encoding: chunked\r\n\r\n".encode()
        )
        try:
            while sent < 6 << 20:
                raw.sendall(piece)
                sent += 0x10000
        except ConnectionError:
            pass
        assert b" 413 " in raw.recv(4096)


def test_the_longest_prompt_that_fits_is_served(cluster: Daemons) -> None:
    status, answer = post(
        cluster, LEGACY, json.dumps({"model": "m", "prompt": [40] * (CONTEXT_TOKENS - 1), "max_tokens": 1}).encode()
    )
    assert status == 200
    assert answer["usage"]["total_tokens"] == CONTEXT_TOKENS


# -- daemons that must not get in ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [("wrong-secret", ["secret"]), ("other-model", ["fingerprint"]), ("twin", ["a", "incarnation"])],
)
def test_a_worker_that_does_not_belong_is_turned_away_for_good(
    guarded: Guarded, cluster: Daemons, name: str, words: list[str]
) -> None:
    daemon = guarded.unwelcome[name]
    assert daemon.wait_exit(60) == 77, daemon.text
    *_, last = [line for line in daemon.text.splitlines() if " rejected " in line]
    assert all(word in last for word in words), last
    assert "Traceback" not in daemon.text
    assert {node["id"] for node in cluster.get("/cluster")["nodes"]} - {"tiny"} == {"a", "b"}


def test_a_port_for_everybody_needs_a_secret(tmp_path: Path) -> None:
    with daemons(tmp_path) as made:
        worker = made.start("w", "--role", "worker", "--coordinator", "10.0.0.1:7070", "--peer-listen", "0.0.0.0:0")
        assert worker.wait_exit(30) == 78
        assert "secret" in worker.text


def test_a_worker_too_small_for_one_layer_joins_idle_and_is_told_why(cluster: Daemons) -> None:
    def explained() -> bool:
        view = cluster.get("/cluster")
        node = next((node for node in view["nodes"] if node["id"] == "tiny"), None)
        return node is not None and node["layers"] is None and "layer" in (node["note"] or "")

    cluster.wait(explained, "the tiny worker with the reason why it is idle")


def test_a_model_too_large_for_the_cluster_is_a_sum_and_serves_once_it_fits(checkpoint: Path, tmp_path: Path) -> None:
    with daemons(tmp_path) as made:
        made.coordinator(checkpoint)
        made.worker("small", "200KiB")

        def refused() -> bool:
            status, answer = post(made, LEGACY, b'{"model":"m","prompt":[1,2],"max_tokens":2}')
            error = answer.get("error", {})
            return status == 503 and error["code"] == "no_feasible_placement" and "needs" in error["message"]

        made.wait(refused, "the refusal that names the sum")
        _, answer = post(made, LEGACY, b'{"model":"m","prompt":[1,2],"max_tokens":2}')
        validate_error(answer)
        assert "offer" in answer["error"]["message"]
        assert [node["id"] for node in made.get("/cluster")["nodes"]] == ["small"]
        made.worker("large", "4MiB")
        made.wait_ready()
        assert post(made, LEGACY, b'{"model":"m","prompt":[1,2],"max_tokens":2}')[0] == 200
        assert {node["id"] for node in made.get("/cluster")["nodes"]} == {"small", "large"}


# -- the peer port, before authentication ----------------------------------------------------------------------------


async def test_garbage_before_authentication_reaches_nobody(cluster: Daemons) -> None:
    host, port = cluster.peers.split(":")
    silent = await asyncio.open_connection(host, int(port))
    for data in (b"\x00\xff" * 1000, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"GET /peer HTTP/1.1\r\n" + b"a" * 100_000):
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(data)
        writer.close()
    async with aiohttp.ClientSession() as session:
        for message in (b"", b"\xc1" * 600, b"HLXD" * 8, b"x" * 4000):
            async with session.ws_connect(f"http://{cluster.peers}/peer") as ws:
                await ws.send_bytes(message)
                answer = await ws.receive(timeout=10)
                assert answer.type in (aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSED, aiohttp.WSMsgType.ERROR)
    silent[1].close()


async def test_another_protocol_version_is_told_both(cluster: Daemons) -> None:
    hello = Hello(PeerIdentity(PeerId("future"), Incarnation(1)), Purpose.CONTROL, b"t" * 16, b"n" * 32, 98, 99)
    async with aiohttp.ClientSession() as session, session.ws_connect(f"http://{cluster.peers}/peer") as ws:
        await ws.send_bytes(hello.encode())
        answer = await ws.receive(timeout=10)
    assert answer.type is aiohttp.WSMsgType.CLOSE
    assert answer.data == CloseCode.VERSION_MISMATCH
    assert "98..99" in (answer.extra or "")


async def test_who_does_not_know_the_secret_says_no_frame(cluster: Daemons) -> None:
    with pytest.raises(AuthRejected):
        async with stranger(cluster, "stranger", secret=b"w" * 40):
            pass


# -- the peer port, from somebody who knows the secret ---------------------------------------------------------------


@dataclass(slots=True)
class Stranger:
    """A peer that speaks the wire and says what it wants."""

    link: Link
    said: "asyncio.Queue[m.Message]"
    lost: "asyncio.Future[str]"

    async def say(self, message: m.Message, payload: memoryview | None = None) -> None:
        await self.link.send(to_frame(message, payload))

    async def hear(self) -> m.Message:
        async with asyncio.timeout(10):
            return await self.said.get()

    async def thrown_out(self) -> str:
        """Why the coordinator closed the link."""
        async with asyncio.timeout(10):
            return await self.lost

    async def tolerated(self) -> None:
        """Everything said so far was handled, and the link stands."""
        await self.say(m.Fetch(77, "no.such.tensor", 0, 10))
        async with asyncio.timeout(10):
            while not isinstance(await self.said.get(), m.Fetched):
                pass


_lives = iter(range(1, 1000))


@asynccontextmanager
async def stranger(
    made: Daemons, name: str, secret: bytes = SECRET.encode(), options: WireOptions | None = None
) -> AsyncIterator[Stranger]:
    said: asyncio.Queue[m.Message] = asyncio.Queue()
    lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def handle(link: Link, frame: Frame) -> None:
        said.put_nowait(from_frame(frame))

    def on_lost(link: Link, reason: str) -> None:
        if not lost.done():
            lost.set_result(reason)

    identity = PeerIdentity(PeerId(name), Incarnation(next(_lives)))
    endpoint = Endpoint(identity, options or WireOptions(), secret, lambda *_: None, lambda link: handle, on_lost)
    host, port = made.peers.split(":")
    async with endpoint:
        yield Stranger(await endpoint.dial(host, int(port), 10.0), said, lost)


def hello(*nodes: str, protocol: int = versions.PROTOCOL_VERSION, budget: int = 1 << 20) -> m.Hello:
    return m.Hello(protocol, [m.NodeHardware(n, "cpu", "none", budget, budget) for n in nodes], "", "", 1, "stranger")


async def test_a_hello_of_another_version_is_refused_for_good(cluster: Daemons) -> None:
    async with stranger(cluster, "old") as peer:
        await peer.say(hello("old", protocol=99))
        answer = await peer.hear()
    assert isinstance(answer, m.Refused)
    assert (answer.code, answer.final) == ("version", True)
    assert "99" in answer.message


@pytest.mark.parametrize("nodes", [("a",), ("liar", "liar"), (COORDINATOR,), ("",)])
async def test_node_names_that_cannot_be_are_refused(cluster: Daemons, nodes: tuple[str, ...]) -> None:
    async with stranger(cluster, "liar") as peer:
        await peer.say(hello(*nodes))
        answer = await peer.hear()
    assert isinstance(answer, m.Refused)
    assert (answer.code, answer.final) == ("node_id", True)


@pytest.mark.parametrize(
    "frame",
    [
        to_frame(m.NodeStatus("a", 0, 0.0, 0, 0, 0, 1 << 60, 0, 0, 0.0, 0, 0)),
        to_frame(m.Welcome("m", "", "float32", 1, 1, 1, 1)),
        Frame(200, [1]),
        Frame(m.Hello.KIND, {"nodes": 7}),
        Frame(m.Hello.KIND, ["x"] * 8),
        Frame(m.Hello.KIND, None),
    ],
    ids=["early", "not-a-workers", "unknown-kind", "no-list", "wrong-types", "nothing"],
)
async def test_nonsense_before_a_welcome_ends_the_link(cluster: Daemons, frame: Frame) -> None:
    async with stranger(cluster, "liar") as peer:
        await peer.link.send(frame)
        assert "could not be handled" in await peer.thrown_out()


def lies(epoch: int) -> list[m.Message]:
    """What no honest worker says: numbers that cannot be, and words about nodes that are not its own."""
    good = [(1.0, 1e-3), (8.0, 2e-3)]
    return [
        m.Measured("liar", [], []),
        m.Measured("liar", good, [(1.0, -1.0)]),
        m.Measured("liar", [(1.0, math.nan)], good),
        m.Measured("liar", good, [(0.0, math.inf)]),
        m.Measured("a", good, good),
        m.NodeStatus("a", 0, 0.0, 0, 0, 0, 1 << 60, 0, 0, 0.0, 0, 0),
        m.EpochState(epoch, "a", "failed", 0, 3, "made up"),
        m.EpochState(epoch, "liar", "exploded", 0, 3, ""),  # type: ignore[arg-type]
        m.Tokens("b", [m.Drawn(sequence, 0, step, 65) for sequence in range(2**32, 2**32 + 40) for step in (16, 17)]),
        m.StageFailed(2**32 + 1, 0, "b", "compute", "made up"),
        m.Closed(2**32 + 1, 0, "a"),
    ]


@pytest.mark.parametrize("at", range(len(lies(0))))
async def test_a_lie_ends_the_link_and_changes_nothing(cluster: Daemons, at: int) -> None:
    before = await asyncio.to_thread(cluster.get, "/cluster")
    async with stranger(cluster, "liar") as peer:
        await peer.say(hello("liar"))
        assert isinstance(await peer.hear(), m.Welcome)
        await peer.say(lies(before["epoch"])[at])
        assert "could not be handled" in await peer.thrown_out()
    after = await asyncio.to_thread(cluster.get, "/cluster")
    assert after["epoch"] == before["epoch"]
    assert after["ready"]["ready"] is True
    capacities = [node["load"]["kv_capacity_token_layers"] for node in after["nodes"] if node["id"] in "ab"]
    assert max(capacities) < 1 << 40


@pytest.mark.parametrize("bandwidth", [0.0, -1.0, math.nan, math.inf])
async def test_a_links_measurement_that_cannot_be_is_not_planned_with(cluster: Daemons, bandwidth: float) -> None:
    async with stranger(cluster, "liar") as peer:
        await peer.say(hello("liar"))
        await peer.hear()
        await peer.say(m.Measured("liar", [(1.0, 1e-3), (64.0, 2e-3)], [(1.0, 1e-3), (8.0, 2e-3)]))
        probe = await peer.hear()
        assert isinstance(probe, m.Probe)
        await peer.say(m.Probed(probe.peer, 1e-3, bandwidth, ""))
        assert "could not be handled" in await peer.thrown_out()
    assert (await asyncio.to_thread(cluster.get, "/readyz"))["ready"] is True


async def test_a_peer_that_grants_too_little_room_for_an_answer_harms_only_itself(cluster: Daemons) -> None:
    async with stranger(cluster, "liar", options=WireOptions(max_body_bytes=16)) as peer:
        await peer.say(hello("liar"))
        assert "at most 16 are allowed" in await peer.thrown_out()


async def test_tensors_that_are_not_there_are_refused_by_name(cluster: Daemons) -> None:
    async with stranger(cluster, "liar") as peer:
        await peer.say(hello("liar"))
        await peer.hear()
        for tensor, offset, length in (("no.such", 0, 10), ("lm_head.weight", 1 << 50, 10), ("../secret", 0, 1 << 62)):
            await peer.say(m.Fetch(5, tensor, offset, length))
            answer = await peer.hear()
            assert isinstance(answer, m.Fetched)
            assert answer.request == 5
            assert answer.error
        await peer.tolerated()


# -- a worker and a coordinator that talks nonsense ------------------------------------------------------------------


async def test_a_worker_outlives_a_coordinator_that_talks_nonsense(tmp_path: Path) -> None:
    """Garbage and passing refusals are tried again, a final refusal is not."""
    answers = iter(
        [
            Frame(200, [1]),
            Frame(m.Welcome.KIND, ["torn"]),
            to_frame(m.Refused("busy", "come back later", False)),
            to_frame(m.Refused("house rules", "not you", True)),
        ]
    )
    heard: list[m.Message] = []

    async def handle(link: Link, frame: Frame) -> None:
        heard.append(from_frame(frame))
        await link.send(next(answers))

    endpoint = Endpoint(
        PeerIdentity(PeerId("hub"), Incarnation(1)), WireOptions(), None, lambda *_: None, lambda link: handle,
        lambda link, reason: None,
    )  # fmt: skip
    async with endpoint:
        host, port = await endpoint.listen("127.0.0.1", 0)
        with daemons(tmp_path) as made:
            made.peers = f"{host}:{port}"
            worker = made.worker("w", "8MiB")
            status = await asyncio.to_thread(worker.wait_exit, 60)
            text = worker.text
    assert status == 77, text
    assert "house rules" in text
    assert "Traceback" not in text.split("rejected")[-1]
    assert [type(message) for message in heard] == [m.Hello] * 4


async def test_a_model_the_worker_cannot_compute_is_refused_by_name(tmp_path: Path) -> None:
    config = memoryview(json.dumps({"architectures": ["MambaForCausalLM"], "model_type": "mamba"}).encode())
    welcome = m.Welcome("m", "f", "float32", 100, 1, 1, 1)

    async def handle(link: Link, frame: Frame) -> None:
        if isinstance(from_frame(frame), m.Hello):
            await link.send(to_frame(welcome, config))

    endpoint = Endpoint(
        PeerIdentity(PeerId("hub"), Incarnation(1)), WireOptions(), None, lambda *_: None, lambda link: handle,
        lambda link, reason: None,
    )  # fmt: skip
    async with endpoint:
        host, port = await endpoint.listen("127.0.0.1", 0)
        with daemons(tmp_path) as made:
            made.peers = f"{host}:{port}"
            worker = made.worker("w", "8MiB")
            status = await asyncio.to_thread(worker.wait_exit, 60)
            assert status == 65, worker.text
            assert "Mamba" in worker.text.splitlines()[-1]
