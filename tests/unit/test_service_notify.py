"""What systemd hears: over a path and over an abstract name, and nothing where nobody asked."""

import os
import re
import secrets
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from helixd.service.notify import MAX_STATUS_CHARACTERS, Notifier, watchdog_interval_s


class Manager:
    """The other end."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind("\0" + address[1:] if address[0] == "@" else address)
        self.socket.settimeout(5)

    def hear(self) -> list[str]:
        return self.socket.recv(4096).decode().split("\n")


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Manager]:
    made = Manager(str(tmp_path / "notify") if request.param == "path" else f"@helixd-{secrets.token_hex(8)}")
    yield made
    made.socket.close()


def test_a_life_is_told(manager: Manager) -> None:
    notifier = Notifier.from_environment({"NOTIFY_SOCKET": manager.address})
    notifier.ready("serving demo")
    assert manager.hear() == ["READY=1", "STATUS=serving demo"]
    notifier.status("loading 3/12")
    assert manager.hear() == ["STATUS=loading 3/12"]
    notifier.alive()
    assert manager.hear() == ["WATCHDOG=1"]
    notifier.reloading()
    first, second = manager.hear()
    assert first == "RELOADING=1"
    assert re.fullmatch(r"MONOTONIC_USEC=\d+", second)
    notifier.stopping("draining", 150.5)
    assert manager.hear() == ["STOPPING=1", "STATUS=draining", "EXTEND_TIMEOUT_USEC=150500000"]
    notifier.close()
    notifier.alive()


def test_a_status_is_said_once_and_on_one_line(manager: Manager) -> None:
    notifier = Notifier(manager.address)
    notifier.status("two\nREADY=1 lines")
    notifier.status("two READY=1 lines")
    notifier.status("x" * 1000)
    assert manager.hear() == ["STATUS=two READY=1 lines"]
    assert manager.hear() == [f"STATUS={'x' * MAX_STATUS_CHARACTERS}"]


def test_a_full_queue_or_a_manager_that_is_gone_holds_nobody_up(manager: Manager) -> None:
    notifier = Notifier(manager.address)
    for _ in range(10_000):
        notifier.alive()
    notifier.status("unheard")
    while manager.hear() == ["WATCHDOG=1"]:
        manager.socket.setblocking(False)
        try:
            manager.socket.recv(4096, socket.MSG_PEEK)
        except BlockingIOError:
            break
    # What could not be said is said again.
    notifier.status("unheard")
    assert manager.hear() == ["STATUS=unheard"]
    manager.socket.close()
    notifier.status("nobody listens")


@pytest.mark.parametrize("address", [None, "", "vsock:2:1", "@", "relative"])
def test_without_a_socket_nothing_happens(address: str | None) -> None:
    notifier = Notifier.from_environment({} if address is None else {"NOTIFY_SOCKET": address})
    notifier.ready("x")
    notifier.alive()
    notifier.close()


@pytest.mark.parametrize(
    ("environ", "interval_s"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "30000000"}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_the_watchdogs_interval(environ: dict[str, str], interval_s: float | None) -> None:
    assert watchdog_interval_s(environ) == interval_s
