"""What clients say stays out of sight: a marked word sent in every place of a request is found nowhere afterwards."""

import http.client
import json
import re
import resource
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helixd.exits import Exit
from tests.daemons import Daemons, daemons

MARK = "mark7f3a91"
KEY = f"sk-{MARK}-key"
SECRET = f"{MARK}-cluster-secret-of-32-bytes-and-more"


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Daemons]:
    home = tmp_path / "home"
    home.mkdir()
    with daemons(home) as made:
        yield made


@pytest.fixture
def cores() -> Iterator[None]:
    """Whoever crashes may leave a core, as far as it is left to us."""
    before = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (before[1], before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_CORE, before)


def private(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o600)
    return path


def address(text: str) -> tuple[str, int]:
    host, port = text.split(":")
    return host, int(port)


def send(made: Daemons, body: bytes, path: str = "/v1/chat/completions", key: str = KEY, **headers: str) -> int:
    connection = http.client.HTTPConnection(*address(made.api), timeout=60)
    try:
        connection.request(
            "POST", path, body, {"Content-Type": "application/json", "Authorization": f"Bearer {key}", **headers}
        )
        answer = connection.getresponse()
        answer.read()
        return answer.status
    finally:
        connection.close()


def raw(made: Daemons, data: bytes) -> bytes:
    with socket.create_connection(address(made.api), 10) as connection:
        connection.sendall(data)
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
        return answer


def get(made: Daemons, path: str) -> str:
    connection = http.client.HTTPConnection(*address(made.api), timeout=60)
    connection.request("GET", path, headers={"Authorization": f"Bearer {KEY}"})
    text = connection.getresponse().read().decode()
    connection.close()
    return text


def said(role: str, text: str = MARK) -> dict[str, Any]:
    return {"role": role, "content": text}


def test_a_word_of_a_client_is_in_no_log_figure_argument_or_file(made: Daemons, tmp_path: Path) -> None:
    keys, secret = private(tmp_path / "keys", KEY), private(tmp_path / "secret", SECRET)
    daemon = made.alone(
        "demo", "--set", f"api.keys_file={keys}", "--secret-file", str(secret), "--set", "log.level=debug",
        "--set", "model.max_context_tokens=512",
    )  # fmt: skip
    made.wait_ready()

    chat = {"model": "demo", "max_tokens": 2, "messages": [said("user")]}
    call = {"id": MARK, "type": "function", "function": {"name": MARK, "arguments": json.dumps({MARK: MARK})}}
    # The demo model has no chat template, another one may: either way the word was there.
    any_of = {200, 400}
    bodies: list[tuple[dict[str, Any], set[int]]] = [
        ({**chat, "messages": [said(role) for role in ("system", "developer", "user", "assistant", "user")]}, any_of),
        ({**chat, "messages": [said("user"), {"role": "assistant", "content": None, "tool_calls": [call]}]}, any_of),
        ({**chat, "messages": [{**said("tool"), "tool_call_id": MARK}], "user": MARK}, any_of),
        ({**chat, "metadata": {MARK: MARK}, "prompt_cache_key": MARK}, any_of),
        ({**chat, "stop": [MARK], "stream": True}, any_of),
        ({**chat, "tools": [{"type": "function", "function": {"name": MARK}}]}, {400}),
        ({**chat, "messages": [said(MARK)]}, {400}),
        ({**chat, "temperature": MARK, MARK: MARK}, {400}),
        ({**chat, "model": MARK}, {404}),
        ({**chat, "messages": [said("user", MARK * 200)]}, {400}),
        ({**chat, "response_format": {"type": MARK}}, {400}),
        ({**chat, "chat_template": MARK}, {400}),
    ]
    for body, statuses in bodies:
        assert send(made, json.dumps(body).encode()) in statuses, body
    text = {"model": "demo", "prompt": f"def {MARK}():", "max_tokens": 2, "logprobs": 2, "echo": True, "stop": MARK}
    whole = json.dumps(text).encode()
    for _ in range(3):
        assert send(made, whole, f"/v1/completions?q={MARK}", **{"x-mark": MARK}) == 200
    assert send(made, json.dumps({"prompt": MARK}).encode(), "/tokenize") == 200
    assert send(made, b'{"' + MARK.encode()) == 400
    assert send(made, b"\xff" + MARK.encode()) == 400
    assert send(made, b"{}", f"/{MARK}") == 404
    assert send(made, b"{}", key=f"sk-{MARK}-wrong") == 401
    assert send(made, b"{}", **{"Content-Encoding": MARK}) == 415
    for data in (
        f"{MARK}\r\n\r\n",
        f"GET /healthz HTTP/1.1\r\nAuthorization: Bearer {MARK}{'x' * 9000}\r\n\r\n",
        f"GET /healthz HTTP/1.1\r\n{MARK}\r\n\r\n",
    ):
        assert b" 400 " in raw(made, data.encode()).split(b"\r\n")[0]
    # A stranger on the peer port, and a client that leaves in the middle of its answer.
    with socket.create_connection(address(made.peers), 10) as stranger:
        stranger.sendall(f"GET /{MARK} HTTP/1.1\r\nHost: {MARK}\r\n\r\n".encode())
        stranger.recv(4096)
    endless = json.dumps({**text, "max_tokens": 300, "stream": True, "ignore_eos": True}).encode()
    with socket.create_connection(address(made.api), 10) as client:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(endless)}\r\n\r\n"
        client.sendall(head.encode() + endless)
        assert b"200 OK" in client.recv(4096)
    daemon.signal(signal.SIGHUP)
    made.wait(lambda: " reloaded " in daemon.text, "the reload")

    seen = {path: get(made, path) for path in ("/metrics", "/cluster", "/readyz", "/version", "/openapi.json")}
    seen["arguments"] = Path(f"/proc/{daemon.process.pid}/cmdline").read_text()
    daemon.signal(signal.SIGTERM)
    assert daemon.wait_exit() == Exit.OK
    seen |= {str(path): path.read_bytes().decode(errors="replace") for path in made.home.rglob("*") if path.is_file()}
    assert any(name.endswith("identity.json") for name in seen)
    assert daemon.text.count(" request ") >= 4
    assert "request_failed" not in daemon.text
    for where, text_seen in seen.items():
        assert MARK not in text_seen, where


@pytest.mark.usefixtures("cores")
def test_a_crash_in_the_middle_of_an_answer_leaves_stacks_and_no_word_of_a_client(
    made: Daemons, tmp_path: Path
) -> None:
    keys, secret = private(tmp_path / "keys", KEY), private(tmp_path / "secret", SECRET)
    daemon = made.alone("demo", "--set", f"api.keys_file={keys}", "--secret-file", str(secret))
    made.wait_ready()
    body = {"model": "demo", "prompt": f"def {MARK}():", "max_tokens": 500, "stream": True, "ignore_eos": True}
    data = json.dumps(body).encode()
    with socket.create_connection(address(made.api), 10) as client:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        client.sendall(head.encode() + data)
        assert b"200 OK" in client.recv(4096)
        limits = Path(f"/proc/{daemon.process.pid}/limits").read_text()
        assert re.search(r"^Max core file size +0 +0 ", limits, re.MULTILINE)
        daemon.signal(signal.SIGABRT)
        assert daemon.wait_exit() == -signal.SIGABRT
    assert "Fatal Python error: Aborted" in daemon.text
    assert "most recent call first" in daemon.text
    for path in made.home.rglob("*"):
        if path.is_file():
            assert MARK.encode() not in path.read_bytes(), path
