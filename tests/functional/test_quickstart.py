"""scripts/quickstart as a user runs it: real processes, real curl. What it says, and that it leaves nothing behind."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "quickstart"
WITHIN_S = 180.0

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")


def environment(tmp_path: Path, **extra: str) -> dict[str, str]:
    """This test's Python instead of a .venv, and a temporary directory of its own."""
    return {**os.environ, "HELIXD_VENV": sys.prefix, "TMPDIR": str(tmp_path), **extra}


def quickstart(tmp_path: Path, *arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
    # Files, not pipes: a cluster that is left running must not hold the test.
    out, err = tmp_path / "out", tmp_path / "err"
    with out.open("w") as stdout, err.open("w") as stderr:
        ended = subprocess.run(
            [str(SCRIPT), *arguments], stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr,
            env=environment(tmp_path, **extra), timeout=WITHIN_S, check=False,
        )  # fmt: skip
    return subprocess.CompletedProcess(ended.args, ended.returncode, out.read_text(), err.read_text())


def daemons(tmp_path: Path) -> list[psutil.Process]:
    """The helixd processes whose state is below `tmp_path`."""
    found = []
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        if "helixd" in words and any(word.startswith(str(tmp_path)) for word in words):
            found.append(process)
    return found


@pytest.fixture(autouse=True)
def _ended(tmp_path: Path) -> Iterator[None]:
    yield
    for process in daemons(tmp_path):
        process.kill()


def wait(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, f"waited for {what}"
        time.sleep(0.05)


def leftovers(tmp_path: Path) -> list[str]:
    return [path.name for path in tmp_path.glob("helixd-quickstart-*")]


def assert_served(printed: str) -> None:
    """A placement of three unequal workers, Python as text, a route over several of them, a speed."""
    rows = re.findall(
        r"^  (worker-\d) +(\d+) MiB +\[(\d+), (\d+)\) +(\d+) tokens +([#.]+)$", printed, re.MULTILINE
    )  # fmt: skip
    assert [row[0] for row in rows] == ["worker-1", "worker-2", "worker-3"]
    assert len({row[1] for row in rows}) == 3
    assert {layer for row in rows for layer in range(int(row[2]), int(row[3]))} == set(range(12))
    assert all(int(row[4]) > 0 and row[5].count("#") == int(row[3]) - int(row[2]) for row in rows)

    text = printed.partition('"stream": true')[2].partition("\n\n")[2].partition("\n\nroute: ")[0]
    assert len(text) > 100
    assert re.search(r'"""|\bdef |\breturn\b|\bself\b|\bif |\bimport ', text.removeprefix("def main"))

    (route,) = re.findall(r"^route: (.+)$", printed, re.MULTILINE)
    hops = [re.fullmatch(r"(worker-\d)\[(\d+), (\d+)\)", hop) for hop in route.split(" -> ")]
    assert len(hops) > 1
    bounds = [(int(hop[2]), int(hop[3])) for hop in hops if hop is not None]
    assert [0, *(end for _, end in bounds)] == [*(start for start, _ in bounds), 12]

    (speed,) = re.findall(r"^(\d+) tokens: the first after [\d.]+ s, then ([\d.]+) tokens/s$", printed, re.MULTILINE)
    assert int(speed[0]) > 1
    assert float(speed[1]) > 0


def test_it_serves_and_stops(tmp_path: Path) -> None:
    ended = quickstart(tmp_path, HELIXD_API__LISTEN="nonsense", http_proxy="http://127.0.0.1:9")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert_served(ended.stdout)
    assert ended.stdout.endswith("Stopped everything.\n")
    assert daemons(tmp_path) == []
    assert leftovers(tmp_path) == []


def test_keep_leaves_it_running_and_says_how_to_stop_it(tmp_path: Path) -> None:
    ended = quickstart(tmp_path, "--keep")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert_served(ended.stdout)
    assert len(daemons(tmp_path)) == 4
    said = {line.split()[0]: line for line in ended.stdout.partition("Still running")[2].splitlines() if line}
    requests = re.findall(r"^  (curl .*)$", ended.stdout, re.MULTILINE)
    answers = [subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True) for line in requests]
    assert '"placement"' in answers[0].stdout
    assert answers[1].stdout.rstrip().endswith("data: [DONE]")
    subprocess.run(["bash", "-c", said["kill"]], check=True)
    wait(lambda: daemons(tmp_path) == [], "every process to end")


def test_a_failure_shows_logs_and_stops_everything(tmp_path: Path) -> None:
    curl = tmp_path / "bin" / "curl"
    curl.parent.mkdir()
    curl.write_text("#!/bin/sh\nexit 7\n")
    curl.chmod(0o755)
    ended = quickstart(tmp_path, "--keep", PATH=f"{curl.parent}:{os.environ['PATH']}")
    assert ended.returncode == 1
    assert "scripts/quickstart: the stream ended early" in ended.stderr
    for name in ("coordinator", "worker-1", "worker-2", "worker-3"):
        assert f"--- {name}.log\n" in ended.stderr
    assert "Still running" not in ended.stdout
    assert daemons(tmp_path) == []
    assert leftovers(tmp_path) == [ended.stdout.rstrip().rpartition("/")[2]]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_midway_stops_everything(tmp_path: Path, number: signal.Signals) -> None:
    out = tmp_path / "out"
    with out.open("w") as stdout:
        script = subprocess.Popen(
            [str(SCRIPT)], stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.PIPE, text=True,
            env=environment(tmp_path),
        )  # fmt: skip
    try:
        wait(lambda: len(daemons(tmp_path)) >= 2, "two processes to be started")
        script.send_signal(number)
        script.send_signal(number)
        _, err = script.communicate(timeout=60)
    finally:
        script.kill()
    assert script.returncode == 130
    assert "Interrupted." in err
    assert out.read_text().endswith("Stopped everything.\n")
    assert daemons(tmp_path) == []
    assert leftovers(tmp_path) == []


def test_without_curl_it_says_so(tmp_path: Path) -> None:
    for tool in ("bash", "dirname"):
        (tmp_path / tool).symlink_to(str(shutil.which(tool)))
    ended = quickstart(tmp_path, PATH=str(tmp_path))
    assert ended.returncode == 1
    assert "curl" in ended.stderr.splitlines()[0]
    assert ended.stdout == ""


@pytest.mark.parametrize(("arguments", "status"), [(["--help"], 0), (["--kep"], 2), (["--keep", "now"], 2)])
def test_usage(tmp_path: Path, arguments: list[str], status: int) -> None:
    ended = quickstart(tmp_path, *arguments)
    assert ended.returncode == status
    assert "scripts/quickstart --keep" in (ended.stderr if status else ended.stdout)
    assert daemons(tmp_path) == []


def test_an_environment_that_is_not_there(tmp_path: Path) -> None:
    ended = quickstart(tmp_path, HELIXD_VENV=str(tmp_path / "none"))
    assert ended.returncode == 1
    assert f"there is no {tmp_path / 'none'}/bin/python" in ended.stderr
