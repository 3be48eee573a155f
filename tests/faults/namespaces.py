"""Hosts of a network of their own: network namespaces, joined by `tests.faults.switch`. Needs root and /dev/net/tun.

A namespace lives as long as its descriptor here, so nothing is left behind. Nothing leads out of this network.
"""

import ctypes
import fcntl
import functools
import json
import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

CLONE_NEWNET = 0x40000000
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
SIOCSIFFLAGS, SIOCSIFADDR, SIOCSIFNETMASK, SIOCSIFMTU = 0x8914, 0x8916, 0x891C, 0x8922
IFF_UP_RUNNING = 0x41
MTU_BYTES = 1400
DEVICE = b"tun0"
SUBNET = "10.77.0"
ROOT = Path(__file__).parents[2]

T = TypeVar("T")


class Unavailable(Exception):
    """Why there can be no namespaces here."""


@dataclass(frozen=True, slots=True)
class Host:
    """`space`: the descriptor of its namespace; `device`: that of its TUN device."""

    number: int
    name: str
    space: int
    device: int

    @property
    def address(self) -> str:
        return f"{SUBNET}.{self.number + 1}"

    @property
    def launcher(self) -> tuple[str, ...]:
        """What to put before the words of a program that is to run on this host."""
        return ("nsenter", f"--net=/proc/{os.getpid()}/fd/{self.space}", "--")

    def enter(self) -> None:
        """From now on the sockets that this thread makes are this host's."""
        _call("setns", self.space, CLONE_NEWNET)


class Network:
    """Use `network(names)`. Ways are what `tests.faults.switch.Way` says, each for one direction."""

    def __init__(self, hosts: Sequence[Host], process: subprocess.Popen[str]) -> None:
        self.hosts = {host.name: host for host in hosts}
        self._process = process

    def between(self, ones: Iterable[str], others: Iterable[str], *, back: bool = True, **conditions: object) -> None:
        """Change the ways from each of `ones` to each of `others`, and those back unless told otherwise."""
        pairs = [(self._number(a), self._number(b)) for a in ones for b in others if a != b]
        if back:
            pairs += [(b, a) for a, b in pairs]
        self._tell({"ways": sorted(set(pairs)), **conditions})

    def everywhere(self, **conditions: object) -> None:
        self.between(self.hosts, self.hosts, **conditions)

    def close_in(self, *names: str) -> None:
        """These hosts, and no others, take no new connections."""
        self._tell({"closed": [self._number(name) for name in names]})

    def heal(self) -> None:
        self.everywhere(up=True, delay_s=0.0, jitter_s=0.0, loss=0.0, rate_bytes_per_s=0.0)
        self.close_in()

    def _number(self, name: str) -> int:
        return self.hosts[name].number

    def _tell(self, change: dict[str, object]) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([change]) + "\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline() == "done\n", "the switch has died"


@functools.cache
def why_not() -> str | None:
    """Why namespaces cannot be had here; None if they can."""
    try:
        host = make_host(0, "try")
    except Unavailable as error:
        return str(error)
    _close(host)
    return None


def make_host(number: int, name: str) -> Host:
    """A namespace with a TUN device and a loopback device. Raises Unavailable."""

    def make() -> tuple[int, int]:
        try:
            _call("unshare", CLONE_NEWNET)
        except OSError as error:
            raise Unavailable(f"no network namespace can be made here: {error.strerror}; it takes root") from None
        space = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        try:
            device = os.open("/dev/net/tun", os.O_RDWR)
            fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH", DEVICE, IFF_TUN | IFF_NO_PI))
        except OSError as error:
            raise Unavailable(f"no TUN device can be made here: {error.strerror}") from None
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
            _set(control, SIOCSIFADDR, DEVICE, _address(f"{SUBNET}.{number + 1}"))
            _set(control, SIOCSIFNETMASK, DEVICE, _address("255.255.255.0"))
            _set(control, SIOCSIFMTU, DEVICE, struct.pack("i", MTU_BYTES))
            for name in (DEVICE, b"lo"):
                _set(control, SIOCSIFFLAGS, name, struct.pack("h", IFF_UP_RUNNING))
        return space, device

    space, device = in_thread(make)
    return Host(number, name, space, device)


def in_thread(work: Callable[[], T]) -> T:
    """Do `work` in a thread that ends afterwards: a namespace that it enters is nobody else's."""
    results: list[T] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            results.append(work())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


@contextmanager
def network(names: Sequence[str]) -> Iterator[Network]:
    """A network of hosts with these names. Raises Unavailable."""
    hosts: list[Host] = []
    try:
        for number, name in enumerate(names):
            hosts.append(make_host(number, name))
        devices = [host.device for host in hosts]
        with subprocess.Popen(
            [sys.executable, "-m", "tests.faults.switch", *map(str, devices)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, pass_fds=devices, cwd=ROOT,
        ) as process:  # fmt: skip
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield Network(hosts, process)
    finally:
        for host in hosts:
            _close(host)


def _close(host: Host) -> None:
    os.close(host.device)
    os.close(host.space)


def _call(name: str, *arguments: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _set(control: socket.socket, request: int, device: bytes, value: bytes) -> None:
    fcntl.ioctl(control, request, struct.pack("16s24s", device, value))


def _address(text: str) -> bytes:
    return struct.pack("HH4s", socket.AF_INET, 0, socket.inet_aton(text))
