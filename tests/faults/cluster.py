"""Real daemons, each on a host of its own (`tests.faults.namespaces`); the test reaches the API through a proxy."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.daemons import Daemon, Daemons
from tests.faults.namespaces import Network, network
from tests.faults.proxy import proxy

HUB = "coordinator"
API_PORT, PEER_PORT = 8080, 7070


@dataclass(slots=True, kw_only=True)
class NetDaemons(Daemons):
    """Use `net_daemons(...)`. `net.hosts` are named like the daemons."""

    net: Network

    def coordinator(self, model: Path | str, *arguments: str) -> Daemon:
        self.peers = f"{self.net.hosts[HUB].address}:{PEER_PORT}"
        return self.start(
            HUB, "--role", "coordinator", "--model", str(model), "--listen", f"127.0.0.1:{API_PORT}",
            "--peer-listen", self.peers, "--set", "planner.settle=200ms", "--secret-file", str(self.home / "secret"),
            *arguments,
        )  # fmt: skip

    def worker(self, name: str, memory: str, *arguments: str) -> Daemon:
        # Named explicitly: not through the zero-argument form, which a class that is made anew for its slots loses.
        return Daemons.worker(self, name, memory, "--secret-file", str(self.home / "secret"), *arguments)

    def isolate(self, name: str, *, up: bool = False) -> None:
        """Nobody reaches that daemon's host; `up`: everybody does again."""
        self.net.between([name], self.net.hosts, up=up)


@contextmanager
def net_daemons(home: Path, workers: Sequence[str]) -> Iterator[NetDaemons]:
    """A network with a host for a coordinator and for each of `workers`; daemons are started by the caller."""
    secret = home / "secret"
    secret.write_bytes(os.urandom(32).hex().encode())
    secret.chmod(0o600)
    with network([HUB, *workers]) as net, proxy(("127.0.0.1", API_PORT), net.hosts[HUB].enter) as api:
        made = NetDaemons(home, net=net)
        made.api = api.address
        made.launchers = {host.name: host.launcher for host in net.hosts.values()}
        try:
            yield made
        finally:
            made.stop()
