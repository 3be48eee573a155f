"""sd_notify(3) without a library: datagrams to the socket that systemd names in $NOTIFY_SOCKET.

Nothing here waits: a message that the manager's queue has no place for is dropped, and the next one says the same.
Without $NOTIFY_SOCKET every call does nothing, so callers need not ask.
"""

import logging
import os
import socket
import time
from collections.abc import Mapping

from helixd import logs

log = logging.getLogger(__name__)

MAX_STATUS_CHARACTERS = 200


class Notifier:
    """The line to the service manager. `address`: a path, or `@name` in Linux' abstract namespace; None: there is none.

    Other kinds of address (systemd knows `vsock:` for virtual machines) are named in the log and not used.
    """

    def __init__(self, address: str | None) -> None:
        self._socket: socket.socket | None = None
        self._status = ""
        if not address:
            return
        if address[0] not in "/@" or len(address) < 2:
            logs.event(log, logging.WARNING, "notify_socket_unknown", address=address)
            return
        self._address = "\0" + address[1:] if address[0] == "@" else address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> "Notifier":
        """The manager that started this process, if one did."""
        return cls(environ.get("NOTIFY_SOCKET"))

    def ready(self, status: str) -> None:
        """The daemon has started, or has reloaded: its configuration is valid and its sockets are bound."""
        self._status = _one_line(status)
        self._send("READY=1", f"STATUS={self._status}")

    def status(self, status: str) -> None:
        """What the daemon is doing, for `systemctl status`; said only if it has changed."""
        line = _one_line(status)
        if line != self._status and self._send(f"STATUS={line}"):
            self._status = line

    def reloading(self) -> None:
        """A reload begins; `ready` ends it."""
        self._send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self, status: str, within_s: float) -> None:
        """The daemon stops, which may take `within_s`."""
        self._status = _one_line(status)
        self._send("STOPPING=1", f"STATUS={self._status}", f"EXTEND_TIMEOUT_USEC={round(within_s * 1e6)}")

    def alive(self) -> None:
        """Pet the watchdog."""
        self._send("WATCHDOG=1")

    def close(self) -> None:
        """Hang up."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _send(self, *lines: str) -> bool:
        if self._socket is None:
            return False
        try:
            self._socket.sendto("\n".join(lines).encode(), self._address)
        except OSError as error:
            logs.event(log, logging.WARNING, "notify_failed", reason=error.strerror or str(error))
            return False
        return True


def watchdog_interval_s(environ: Mapping[str, str], pid: int | None = None) -> float | None:
    """How often the manager wants to hear `alive` from this process ($WATCHDOG_USEC); None: not at all."""
    meant = environ.get("WATCHDOG_PID")
    if meant and meant != str(os.getpid() if pid is None else pid):
        return None
    text = environ.get("WATCHDOG_USEC", "")
    return int(text) / 1e6 if text.isascii() and text.isdigit() and int(text) > 0 else None


def _one_line(status: str) -> str:
    return " ".join(status.split())[:MAX_STATUS_CHARACTERS]
