"""How a real helixd process ends: signals, what its clients see meanwhile, addresses it cannot have."""

import signal
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from helixd.assembly import cannot_listen
from helixd.exits import Exit
from tests.daemons import Daemon, Daemons, Stream, daemons

ENDLESS = 1900


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Daemons]:
    with daemons(tmp_path) as made:
        yield made


def ended(daemon: Daemon) -> int:
    return daemon.process.wait(timeout=60)


def stream(made: Daemons, max_tokens: int) -> Stream:
    return Stream(made, {"model": "demo", "prompt": "def main():", "max_tokens": max_tokens, "stream": True})


def wait_for_text(daemon: Daemon, text: str) -> None:
    deadline = time.monotonic() + 60
    while text not in daemon.text:
        assert time.monotonic() < deadline, f"waited for {text!r} in\n{daemon.text}"
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_a_stream_end_and_takes_nothing_new(made: Daemons, number: signal.Signals) -> None:
    daemon = made.alone("demo", "--set", "cluster.timers.drain=60s")
    made.wait_ready()
    running = stream(made, 200).read(at_most=5)
    daemon.signal(number)
    wait_for_text(daemon, "draining")
    with pytest.raises(urllib.error.HTTPError) as refused:
        made.post("/v1/completions", {"model": "demo", "prompt": "x"})
    assert refused.value.code == 503
    running.read()
    assert running.done, (running.error, running.text, daemon.text)
    assert ended(daemon) == Exit.OK
    assert "WARNING" not in daemon.text
    assert " stopped\n" in daemon.text


def test_a_second_signal_ends_streams_with_an_error_at_once(made: Daemons) -> None:
    daemon = made.alone("demo", "--set", "cluster.timers.drain=600s")
    made.wait_ready()
    running = stream(made, ENDLESS).read(at_most=5)
    daemon.signal(signal.SIGINT)
    wait_for_text(daemon, "draining")
    daemon.signal(signal.SIGINT)
    running.read()
    assert running.error is not None
    assert running.error["code"] == "shutting_down"
    assert not running.done
    assert ended(daemon) == Exit.OK
    assert "stopped_before_drained" in daemon.text


def test_what_outlasts_the_drain_ends_with_an_error(made: Daemons) -> None:
    daemon = made.alone("demo", "--set", "cluster.timers.drain=200ms")
    made.wait_ready()
    running = stream(made, ENDLESS).read(at_most=5)
    daemon.signal(signal.SIGTERM)
    running.read()
    assert running.error is not None
    assert running.error["code"] == "shutting_down"
    assert ended(daemon) == Exit.OK
    assert "drain_timeout requests=1" in daemon.text


@pytest.mark.parametrize(("key", "flag"), [("api.listen", "--listen"), ("cluster.listen", "--peer-listen")])
def test_an_address_in_use_is_named_with_the_way_out(made: Daemons, key: str, flag: str) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        address = f"127.0.0.1:{holder.getsockname()[1]}"
        daemon = made.alone("demo", "--set", f"{key}={address}")
        assert ended(daemon) == Exit.CONFIG
    (line,) = daemon.text.splitlines()
    assert f"{key} = {address}: Address already in use; give another address with {flag} HOST:PORT" in line


def test_an_address_whose_host_nobody_knows_says_so() -> None:
    """A resolver's numbers are its own: the system has no words for them."""
    unknown = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    said = cannot_listen("api.listen", "--listen", "nowhere.invalid", 80, unknown)
    assert (
        said
        == "api.listen = nowhere.invalid:80: Name or service not known; give another address with --listen HOST:PORT"
    )


def test_a_state_directory_in_use_is_named(made: Daemons) -> None:
    made.alone("demo")
    made.wait_ready()
    # The second has the first one's name, so it would not be ended with the test.
    first = made.all.pop("alone")
    try:
        other = made.alone("demo")
        assert ended(other) == Exit.STATE_NOT_WRITABLE
    finally:
        first.kill()
    assert "another helixd uses the state directory" in other.text
    assert "--state-dir" in other.text


def test_what_keeps_a_daemon_from_starting_is_its_status(made: Daemons, tmp_path: Path) -> None:
    """The others are 0 (above), 70 (a device that hangs), 77 (turned away) and 130 (interrupted while starting)."""
    model = tmp_path / "m"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (tmp_path / "file").touch()
    started = {
        Exit.USAGE: made.start("usage", "--no-such-flag"),
        Exit.BAD_MODEL: made.start("model", "--role", "coordinator", "--model", str(model), "--listen", "127.0.0.1:0"),
        Exit.STATE_NOT_WRITABLE: made.start("state", "--model", "demo", "--state-dir", str(tmp_path / "file" / "s")),
        Exit.CONFIG: made.start("config", "--model", "demo", "--set", "api.limits.n=0"),
    }
    assert {ended(daemon) for daemon in started.values()} == set(started), [d.text for d in started.values()]
    for status, daemon in started.items():
        assert ended(daemon) == status, daemon.text
        assert "Traceback" not in daemon.text
