"""Real helixd processes for tests: started with their own state, found through their logs, ended at the end."""

import http.client
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

ROOT = Path(__file__).parents[1]
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"

STATUS_INTERVAL_S = 1.1


def byte_tokenizer(vocab_size: int) -> Tokenizer:
    """256 bytes, then entries up to `vocab_size` that no text needs."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: at for at, letter in enumerate(alphabet)}
    for at in range(len(vocab), vocab_size):
        vocab[f"{alphabet[at % 90 + 65]}{alphabet[at // 90 + 65]}"] = at
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def add_tokenizer(path: Path) -> None:
    """Give a checkpoint a byte tokenizer of as many ids as the model has, a chat template, and no end token."""
    config = json.loads((path / "config.json").read_text())
    byte_tokenizer(config["vocab_size"]).save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    (path / "generation_config.json").write_text("{}")
    for key in ("eos_token_id", "bos_token_id"):
        config.pop(key, None)
    (path / "config.json").write_text(json.dumps(config))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(slots=True)
class Daemon:
    name: str
    process: subprocess.Popen[bytes]
    log: Path
    arguments: list[str]

    @property
    def text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def wait_exit(self, within_s: float = 30.0) -> int:
        return self.process.wait(within_s)


@dataclass(slots=True)
class Daemons:
    """Processes of one test below `home`."""

    home: Path
    all: dict[str, Daemon] = field(default_factory=dict)
    api: str = ""
    peers: str = ""
    environ: dict[str, str] = field(default_factory=dict)
    program: tuple[str, ...] = ("-m", "helixd")
    launchers: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Words to put before those of the daemon of that name."""
    scheme: str = "http"
    context: ssl.SSLContext | None = None

    def start(self, name: str, *arguments: str) -> Daemon:
        log = self.home / f"{name}.log"
        words = [
            *self.launchers.get(name, ()), sys.executable, *self.program, "--state-dir", str(self.home / name),
            "--set", f"node.cache_dir={self.home / name / 'cache'}", "--set", "log.format=text",
            "--set", "device.threads=1", "--set", "cluster.timers.drain=3s", *arguments,
        ]  # fmt: skip
        environment = {**os.environ, "HELIXD_CONFIG": os.devnull, "OMP_NUM_THREADS": "1", **self.environ}
        with log.open("ab") as out:
            process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=environment, cwd=ROOT
            )
        self.all[name] = Daemon(name, process, log, list(arguments))
        return self.all[name]

    def restart(self, name: str) -> Daemon:
        return self.start(name, *self.all[name].arguments)

    def coordinator(self, model: Path | str, *arguments: str) -> Daemon:
        self.api, self.peers = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
        return self.start(
            "coordinator", "--role", "coordinator", "--model", str(model), "--listen", self.api,
            "--peer-listen", self.peers, "--set", "planner.settle=200ms", *arguments,
        )  # fmt: skip

    def worker(self, name: str, memory: str, *arguments: str) -> Daemon:
        return self.start(
            name, "--role", "worker", "--coordinator", self.peers, "--memory", memory, "--device", "cpu",
            "--set", f"node.id={name}", *arguments,
        )  # fmt: skip

    def pinned_cluster(
        self, model: Path | str, stages: Mapping[str, tuple[int, int]], *arguments: str, worker: Sequence[str] = (),
        excluded: Sequence[str] = (),
    ) -> None:  # fmt: skip
        """A coordinator, and one worker per stage which holds exactly those layers. `excluded` nodes get none."""
        config = self.home / "cluster.toml"
        pins = "".join(f'[planner.pins."{name}"]\nrange = [{a}, {b}]\n' for name, (a, b) in stages.items())
        pins += "".join(f'[planner.pins."{name}"]\nexclude = true\n' for name in excluded)
        config.write_text(f"[planner]\nwait_for_nodes = {len(stages)}\n{pins}")
        self.coordinator(model, "--config", str(config), *arguments)
        for name in stages:
            self.worker(name, "8MiB", *worker)

    def alone(self, model: Path | str, *arguments: str) -> Daemon:
        """Coordinator and worker in one process."""
        self.api, self.peers = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
        return self.start(
            "alone", "--model", str(model), "--listen", self.api, "--peer-listen", self.peers, "--memory", "32MiB",
            "--device", "cpu", "--set", "planner.settle=0", *arguments,
        )  # fmt: skip

    def post(self, path: str, body: object) -> Any:
        request = urllib.request.Request(
            f"{self.scheme}://{self.api}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=30, context=self.context) as answer:
            return json.load(answer)

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"{self.scheme}://{self.api}{path}", timeout=10, context=self.context) as answer:
            return json.load(answer)

    def figures(self, name: str) -> dict[str, float]:
        """A metric's values by their labels."""
        with urllib.request.urlopen(f"{self.scheme}://{self.api}/metrics", timeout=30, context=self.context) as answer:
            lines = [line for line in answer.read().decode().splitlines() if line.startswith(name)]
        return {line[len(name) : line.rindex(" ")]: float(line.split()[-1]) for line in lines}

    def wait_ready(self, within_s: float = 240.0) -> None:
        self.wait(lambda: bool(self.get("/readyz")["ready"]), "the cluster to be ready", within_s)

    def wait(self, condition: Any, what: str, within_s: float = 30.0) -> None:
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline:
            crashed = [d.name for d in self.all.values() if d.process.poll() not in (None, -signal.SIGKILL)]
            assert not crashed, f"{crashed} ended while waiting for {what}\n{self.tails()}"
            try:
                if condition():
                    return
            except (OSError, urllib.error.HTTPError):
                pass
            time.sleep(0.1)
        raise AssertionError(f"waited {within_s:g} s for {what}\n{self.tails()}")

    def wait_idle(self) -> None:
        """No KV, no sequence, no reservation anywhere, for longer than nodes take to say how they are."""

        def idle() -> bool:
            view = self.get("/cluster")
            loads = [node["load"] for node in view["nodes"]]
            return (
                view["requests"]["running"] == view["requests"]["waiting"] == 0
                and all(node["kv_reserved_token_layers"] == 0 for node in view["nodes"])
                and all(load is not None and load["kv_pages_used"] == load["open_sequences"] == 0 for load in loads)
                and all(load["kv_used_token_layers"] == load["queued_tokens"] == 0 for load in loads)
            )

        self.wait(idle, "every node to be idle with no KV in use")
        time.sleep(STATUS_INTERVAL_S)
        self.wait(idle, "every node to stay idle with no KV in use")

    def tails(self) -> str:
        return "\n".join(f"--- {d.name}\n" + "\n".join(d.text.splitlines()[-15:]) for d in self.all.values())

    def stop(self) -> None:
        for daemon in self.all.values():
            if daemon.process.poll() is None:
                daemon.signal(signal.SIGCONT)
                daemon.kill()


@contextmanager
def daemons(home: Path) -> Iterator[Daemons]:
    made = Daemons(home)
    try:
        yield made
    finally:
        made.stop()


def completion(made: Daemons, prompt: Sequence[int], max_tokens: int, **fields: object) -> "Stream":
    return Stream(made, {"model": "m", "prompt": list(prompt), "max_tokens": max_tokens, "stream": True, **fields})


class Stream:
    """A streamed completion read with the standard library, piece by piece: chunks of one or more tokens.

    `gaps_s`: how long each piece but the first was waited for. `silences_s`: the same for each line, comments too.
    """

    def __init__(self, made: Daemons, body: dict[str, object]) -> None:
        request = urllib.request.Request(
            f"{made.scheme}://{made.api}/v1/completions",
            json.dumps({"temperature": 0, "logprobs": 0, "ignore_eos": True, **body}).encode(),
            {"Content-Type": "application/json"},
        )
        self.answer = urllib.request.urlopen(request, timeout=120, context=made.context)
        self.route = self.answer.headers.get("x-helixd-route", "")
        self.text = ""
        self.pieces = 0
        self.tokens = 0
        self.error: dict[str, Any] | None = None
        self.done = False
        self.reason: str | None = None
        self.keep_alives = 0
        self.ended_s = 0.0
        self.gaps_s: list[float] = []
        self.silences_s: list[float] = []
        self._piece_s: float | None = None
        self._line_s = time.monotonic()

    def read(self, at_most: int | None = None) -> "Stream":
        """To the end, or until `at_most` pieces have come in all."""
        while at_most is None or self.pieces < at_most:
            try:
                line = self.answer.readline()
            except (http.client.HTTPException, OSError):
                break
            if not line:
                break
            now_s = time.monotonic()
            self.silences_s.append(now_s - self._line_s)
            self._line_s = now_s
            self.keep_alives += line == b": keep-alive\n"
            found = re.match(rb"data: (.*)\n", line)
            if not found:
                continue
            if found[1] == b"[DONE]":
                self.done = True
                continue
            chunk = json.loads(found[1])
            if "error" in chunk:
                self.error = chunk["error"]
                continue
            if self._piece_s is not None:
                self.gaps_s.append(now_s - self._piece_s)
            self._piece_s = now_s
            self.pieces += 1
            choice = chunk["choices"][0]
            self.tokens += len((choice.get("logprobs") or {}).get("tokens", ()))
            self.text += choice["text"]
            self.reason = choice["finish_reason"] or self.reason
        self.ended_s = time.monotonic()
        return self

    def close(self) -> None:
        self.answer.close()
