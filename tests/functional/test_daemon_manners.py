"""How a real helixd process gets on with its service manager: what it tells it, SIGHUP, a device that hangs."""

import asyncio
import json
import os
import secrets
import signal
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helixd import daemon
from helixd.emulation.hollow import write_hollow_checkpoint
from helixd.exits import Exit
from helixd.plan.cluster.clusterfile import parse_cluster
from tests.daemons import Daemons, completion, daemons
from tests.functional.test_emulation import NODES, cluster_file

WATCHDOG_S = 1.5
HANGING = """
import pathlib, sys, time
from helixd.emulation.backend import EmulatedCompute
run = EmulatedCompute.run
def run_or_hang(self, step):
    while pathlib.Path(sys.argv[sys.argv.index("--state-dir") + 1], "hang").exists():
        time.sleep(0.1)
    return run(self, step)
EmulatedCompute.run = run_or_hang
from helixd.cli import main
sys.exit(main())
"""


class Manager:
    """A service manager's socket, in the abstract namespace. `said`: every message, in order."""

    def __init__(self) -> None:
        self.address = f"@helixd-test-{secrets.token_hex(8)}"
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind("\0" + self.address[1:])
        self.said: list[dict[str, str]] = []

    def hear(self) -> list[dict[str, str]]:
        """Everything said so far."""
        while True:
            try:
                data = self.socket.recv(4096, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return self.said
            self.said.append(dict(line.split("=", 1) for line in data.decode().split("\n")))

    def wait(self, key: str, text: str, times: int = 1) -> None:
        deadline = time.monotonic() + 60
        while sum(text in message.get(key, "") for message in self.hear()) < times:
            assert time.monotonic() < deadline, (key, text, self.said)
            time.sleep(0.05)


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Daemons]:
    with daemons(tmp_path) as made:
        yield made


@pytest.fixture
def manager(made: Daemons) -> Iterator[Manager]:
    manager = Manager()
    made.environ = {"NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": str(round(WATCHDOG_S * 1e6))}
    yield manager
    manager.socket.close()


def status_of(made: Daemons, key: str = "", **fields: Any) -> int:
    """The status of a completion asked for with `key`."""
    url, body = f"http://{made.api}/v1/completions", {"model": "demo", "prompt": "x", "max_tokens": 1, **fields}
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    data = repr(body).replace("'", '"').encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_a_life_under_a_service_manager(made: Daemons, manager: Manager, tmp_path: Path) -> None:
    keys, file = tmp_path / "keys", tmp_path / "helixd.toml"
    file.write_text("")
    running = made.alone("demo", "--config", str(file))

    # Ready once it listens; what it does meanwhile and then is its status.
    manager.wait("READY", "1")
    made.wait_ready()
    manager.wait("STATUS", "serving demo; joined ")
    manager.wait("WATCHDOG", "1", times=3)
    first = manager.said[0]
    assert first["READY"] == "1"
    assert first["STATUS"].startswith("not serving demo: ")

    # A file that changes what may change.
    assert status_of(made, n=2) == 200
    keys.write_text("sesame\n")
    keys.chmod(0o600)
    good = '[api]\nkeys_file = "keys"\n[api.limits]\nn = 1\nbody = "2KiB"\n[log]\nlevel = "debug"\n'
    file.write_text(good + '[planner]\ntime_limit = "3s"\n')
    running.signal(signal.SIGHUP)
    manager.wait("READY", "1", times=2)
    at = next(n for n, message in enumerate(manager.said) if "RELOADING" in message)
    assert int(manager.said[at]["MONOTONIC_USEC"]) <= time.monotonic_ns() // 1000
    assert any("READY" in message for message in manager.said[at:])
    [line] = [line for line in running.text.splitlines() if " reloaded " in line]
    for key in ("log.level", "api.keys_file", "api.limits.n", "api.limits.body"):
        assert key in line
    [line] = [line for line in running.text.splitlines() if " restart_needed " in line]
    assert "planner.time_limit" in line
    assert status_of(made) == 401
    assert status_of(made, "sesame") == 200
    assert status_of(made, "sesame", n=2) == 400
    assert status_of(made, "sesame", prompt="x" * 2048) == 413

    # Asked what goes on, it tells of its tasks and queues, not of what was said.
    running.signal(signal.SIGUSR1)
    deadline = time.monotonic() + 30
    while " snapshot " not in running.text:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    [line] = [line for line in running.text.splitlines() if " snapshot " in line]
    for word in ("tasks=", "replanner", "requests_running=0", "requests_waiting=0", "queues=", "loop_lag_s="):
        assert word in line
    asked = urllib.request.Request(f"http://{made.api}/metrics", headers={"Authorization": "Bearer sesame"})
    with urllib.request.urlopen(asked, timeout=30) as answer:
        assert b"\nhelixd_loop_lag_seconds " in answer.read()

    # Files that cannot be used change nothing: no TOML, a bad value and an unknown key, keys that are open to all.
    refused = 0
    for text, mode, why in [
        ("[api", 0o600, "not valid TOML"),
        (good.replace("n = 1", 'n = 0\ncolour = "red"'), 0o600, "unknown key api.limits.colour"),
        (good, 0o644, "can be read by others"),
    ]:
        file.write_text(text)
        keys.chmod(mode)
        running.signal(signal.SIGHUP)
        refused += 1
        manager.wait("READY", "1", times=2 + refused)
        assert why in running.text
        assert status_of(made, "sesame") == 200
        assert status_of(made) == 401

    # A key that is taken out of the file is no longer taken.
    keys.write_text("other\n")
    keys.chmod(0o600)
    file.write_text(good)
    running.signal(signal.SIGHUP)
    manager.wait("READY", "1", times=3 + refused)
    assert status_of(made, "sesame") == 401
    assert status_of(made, "other") == 200

    # A process that stands still pets no watchdog.
    running.signal(signal.SIGSTOP)
    time.sleep(0.2)
    before = len(manager.hear())
    time.sleep(WATCHDOG_S)
    assert len(manager.hear()) == before
    running.signal(signal.SIGCONT)
    manager.wait("WATCHDOG", "1", times=sum("WATCHDOG" in message for message in manager.said) + 1)

    running.signal(signal.SIGTERM)
    assert running.wait_exit() == Exit.OK
    manager.hear()
    [stopping] = [message for message in manager.said if "STOPPING" in message]
    assert stopping["STATUS"].startswith("draining; ")
    assert int(stopping["EXTEND_TIMEOUT_USEC"]) >= 3e6


def test_a_worker_whose_device_hangs_leaves_and_ends(made: Daemons, tmp_path: Path) -> None:
    """Its sequences go on elsewhere, and its status makes the service manager start it again."""
    file = cluster_file(tmp_path / "cluster.json")
    spec = parse_cluster(json.loads(file.read_text()))
    hollow = write_hollow_checkpoint(tmp_path / "m", spec)
    config = tmp_path / "cluster.toml"
    pins = {"fast": [0, 6], "slow1": [0, 3], "slow2": [3, 6]}
    config.write_text(
        "[planner]\nwait_for_nodes = 3\n" + "".join(f"[planner.pins.{n}]\nrange = {pin}\n" for n, pin in pins.items())
    )
    made.coordinator(tmp_path / "m", "--config", str(config))
    made.program = ("-c", HANGING)
    for node in spec.nodes:
        made.start(
            node.id, "--role", "worker", "--coordinator", made.peers, "--device", f"emulated:{NODES[node.id]}",
            "--cluster-file", str(file), "--memory", str(hollow.memory_bytes(node.profile)),
            "--set", f"node.id={node.id}", "--set", "cluster.timers.step=500ms",
        )  # fmt: skip
    made.wait_ready()
    whole = completion(made, b"hello", 60).read().text
    stream = completion(made, b"hello", 60).read(at_most=3)
    name = stream.route.split("[")[0]
    (tmp_path / name / "hang").touch()
    stream.read()
    assert stream.done, stream.error
    assert stream.text == whole
    hung = made.all.pop(name)
    assert hung.wait_exit() == Exit.INTERNAL
    assert f"device_hangs node={name}" in hung.text


def test_sighup_reloads_unless_the_terminal_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    leader, follower = os.openpty()

    async def scenario() -> None:
        with daemon._signals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            async with asyncio.timeout(10):
                await signals.reload.wait()
            assert not signals.stop.is_set()
            os.close(leader)
            os.kill(os.getpid(), signal.SIGHUP)
            async with asyncio.timeout(10):
                await signals.stop.wait()

    with open(follower, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        asyncio.run(scenario())


def test_secrets_that_systemd_passes_in_are_used_as_they_are(made: Daemons, tmp_path: Path) -> None:
    """Their mode shows an access list as rights of the group; their directory is what guards them."""
    credentials = tmp_path / "credentials"
    credentials.mkdir(mode=0o700)
    for name, text in (("cluster-secret", "s" * 40), ("api-keys", "sesame")):
        (credentials / name).write_text(text)
        (credentials / name).chmod(0o440)
    made.environ = {"CREDENTIALS_DIRECTORY": str(credentials)}
    made.coordinator("demo")
    made.wait(lambda: status_of(made) == 401, "the API to want a key")
    assert status_of(made, "sesame") == 503
