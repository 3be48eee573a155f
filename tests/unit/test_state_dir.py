"""What a daemon remembers: one identity, incarnations that rise, one daemon at a time."""

import errno
import os
import threading
from pathlib import Path

import pytest

from helixd.ids import Epoch
from helixd.state import StateDir, StateError


def test_identity_stays_and_incarnations_and_epochs_rise(tmp_path: Path) -> None:
    first = StateDir.open(tmp_path / "state")
    first.remember_epoch(Epoch(5))
    first.close()
    second = StateDir.open(tmp_path / "state")
    assert second.peer == first.peer
    assert second.incarnation == first.incarnation + 1
    assert second.epoch == 5
    second.close()


def test_nobody_waits_for_a_slow_disk_and_what_was_said_last_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = StateDir.open(tmp_path)
    disk = threading.Event()

    def slow(fd: int) -> None:
        assert disk.wait(1), "somebody waits for the disk who should not"

    monkeypatch.setattr(os, "fsync", slow)
    for epoch in (1, 2, 3):
        state.remember_epoch(Epoch(epoch))
        assert state.epoch == epoch
    disk.set()
    state.close()
    assert StateDir.open(tmp_path).epoch == 3


def test_a_full_disk_costs_the_memory_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    state = StateDir.open(tmp_path)

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(os, "fsync", full)
    state.remember_epoch(Epoch(6))
    state.remember_epoch(Epoch(7))
    state.close()
    assert state.epoch == 7
    assert state.write_errors == 2
    assert caplog.text.count("epoch_not_kept") == 1
    assert list(tmp_path.glob("*.partial")) == []


def test_a_configured_id_wins(tmp_path: Path) -> None:
    state = StateDir.open(tmp_path, "my-node")
    assert state.peer == "my-node"
    state.close()


def test_a_second_daemon_is_kept_out(tmp_path: Path) -> None:
    first = StateDir.open(tmp_path)
    with pytest.raises(StateError, match="another helixd"):
        StateDir.open(tmp_path)
    first.close()
    StateDir.open(tmp_path).close()


def test_a_damaged_file_is_kept_aside(tmp_path: Path) -> None:
    (tmp_path / "identity.json").write_text("{not json")
    StateDir.open(tmp_path).close()
    assert (tmp_path / "identity.bad").read_text() == "{not json"


def test_a_place_that_is_no_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match="state_dir"):
        StateDir.open(tmp_path / "file")
