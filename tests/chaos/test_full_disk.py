"""A state directory without room for a byte more: who runs serves on and counts it, who starts says so and ends."""

import errno
import os
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from helixd.exits import Exit
from tests.daemons import Daemons, add_tokenizer, daemons
from tests.families import make_checkpoint

pytestmark = pytest.mark.chaos


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Daemons]:
    with daemons(tmp_path) as made:
        yield made


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MiB where the coordinator keeps its state."""
    place = tmp_path / "coordinator"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        pytest.skip(f"no disk of 1 MiB can be made here: {error}")
    if mounted.returncode:
        pytest.skip(f"no disk of 1 MiB can be made here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(disk: Path) -> Path:
    junk = disk / "junk"
    for size in (4096, 1):
        while _takes(junk, size):
            pass
    return junk


def _takes(junk: Path, size: int) -> bool:
    try:
        with junk.open("ab", buffering=0) as file:
            file.write(bytes(size))
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        return False
    return True


def write_errors(made: Daemons) -> float:
    with urllib.request.urlopen(f"http://{made.api}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    [line] = [line for line in lines if line.startswith("helixd_state_write_errors_total ")]
    return float(line.split()[1])


def test_a_full_disk_is_served_on_and_nothing_is_broken_when_there_is_room_again(
    made: Daemons, disk: Path, tmp_path: Path
) -> None:
    model = tmp_path / "m"
    make_checkpoint("llama2", model, 1)
    add_tokenizer(model)
    ask = {"model": "m", "prompt": [1, 2, 3], "max_tokens": 8, "temperature": 0}
    coordinator = made.coordinator(model)
    made.worker("w", "8MiB")
    made.wait_ready()
    before = made.post("/v1/completions", ask)["choices"][0]["text"]
    assert write_errors(made) == 0
    kept = (disk / "identity.json").read_text()
    junk = fill(disk)

    # A new plan cannot be remembered: another worker takes the place of the one that is lost.
    made.all["w"].kill()
    made.wait(lambda: not made.get("/cluster")["nodes"], "the loss of the worker")
    made.worker("other", "8MiB")
    made.wait_ready()
    made.wait(lambda: write_errors(made) >= 1, "the write that fails")
    assert made.post("/v1/completions", ask)["choices"][0]["text"] == before
    assert coordinator.text.count("epoch_not_kept") == 1
    # What was there is whole, nothing half-written is.
    assert (disk / "identity.json").read_text() == kept
    assert not list(disk.glob("*.partial"))

    coordinator.kill()
    junk.unlink()
    made.restart("coordinator")
    made.wait_ready()
    assert made.post("/v1/completions", ask)["choices"][0]["text"] == before
    assert write_errors(made) == 0
    made.all["other"].kill()

    made.all["coordinator"].kill()
    fill(disk)
    assert made.restart("coordinator").wait_exit() == Exit.STATE_NOT_WRITABLE
    assert os.strerror(errno.ENOSPC) in coordinator.text
