"""What a daemon remembers between its lives: who it is, how often it has lived, the last epoch.

One JSON file in the state directory, written whole or not at all, and a lock that keeps a second daemon out: two
daemons with one identity would be one peer twice.
"""

import fcntl
import json
import logging
import os
import re
import secrets
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self

from helixd import logs
from helixd.errors import HelixError
from helixd.files import write_whole
from helixd.ids import Epoch, Incarnation, PeerId

log = logging.getLogger(__name__)


class StateError(HelixError):
    """The state directory cannot be used; the daemon exits 73."""


class StateDir:
    """An opened and locked state directory. `incarnation` is this life's, one above the last one's.

    Opening and closing wait for the disk; what is remembered in between is written by a thread of its own.
    """

    def __init__(self, path: Path, lock: int, peer: PeerId, incarnation: Incarnation, epoch: Epoch) -> None:
        self.path = path
        self.peer = peer
        self.incarnation = incarnation
        self.epoch = epoch
        self.write_errors = 0
        self._lock = lock
        self._full = False
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="state")

    @classmethod
    def open(cls, path: Path, peer: str = "") -> Self:
        """Begin a new life. `peer`: the configured id, "" for the remembered (or a new) one. Raises StateError."""
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StateError(f"state directory {path} cannot be used: {error}; set node.state_dir") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(lock)
            raise StateError(
                f"another helixd uses the state directory {path}; give each daemon its own with --state-dir"
            ) from error
        known = _read(path / "identity.json")
        name = peer or str(known.get("peer") or _new_name())
        state = cls(
            path, lock, PeerId(name), Incarnation(_count(known, "incarnation") + 1), Epoch(_count(known, "epoch"))
        )
        state._write()
        return state

    def remember_epoch(self, epoch: Epoch) -> None:
        """Epochs only rise, over lives too. A slow disk holds nobody up, a full one costs the memory only."""
        self.epoch = epoch
        self._writer.submit(self._keep)

    def close(self) -> None:
        """Let another daemon use the directory, once everything is written."""
        self._writer.shutdown()
        os.close(self._lock)

    def _keep(self) -> None:
        try:
            self._write()
        except StateError as error:
            self.write_errors += 1
            # Once for a disk that is full, not at every plan until somebody makes room.
            if not self._full:
                logs.event(log, logging.WARNING, "epoch_not_kept", epoch=self.epoch, reason=str(error))
            self._full = True
        else:
            self._full = False

    def _write(self) -> None:
        path = self.path / "identity.json"
        facts = {"peer": self.peer, "incarnation": self.incarnation, "epoch": self.epoch}
        try:
            write_whole(path, json.dumps(facts))
        except OSError as error:
            raise StateError(f"cannot write {path}: {error}") from error


def _read(path: Path) -> dict[str, object]:
    try:
        known = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        # A new identity is better than no daemon; the old file is kept for whoever wonders.
        path.rename(path.with_suffix(".bad"))
        kept = str(path.with_suffix(".bad"))
        logs.event(log, logging.WARNING, "identity_unreadable", path=str(path), reason=str(error), kept_as=kept)
        return {}
    return known if isinstance(known, dict) else {}


def _count(known: dict[str, object], key: str) -> int:
    value = known.get(key)
    return value if isinstance(value, int) and value >= 0 else 0


def _new_name() -> str:
    host = re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname()) or "node"
    return f"{host[:48]}-{secrets.token_hex(3)}"
