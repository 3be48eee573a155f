"""The faults that tests make are the faults they say: a chaos test proves nothing with a tool that does nothing."""

import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest

from tests.faults.namespaces import Host, Network, in_thread, network, why_not
from tests.faults.proxy import ChaosProxy, proxy
from tests.faults.switch import QUEUE_S, Way

NOBODY_S = 0.3
"""What does not come within this does not come."""


class Echo:
    """A server that sends back what it gets and counts its connections; `host` None: on this machine's own loopback."""

    def __init__(self, host: Host | None = None) -> None:
        at = "127.0.0.1" if host is None else host.address

        def listen() -> socket.socket:
            if host is not None:
                host.enter()
            return socket.create_server((at, 0))

        self.listener = in_thread(listen)
        self.address: tuple[str, int] = self.listener.getsockname()
        self.accepted = self.received_bytes = 0
        self._threads = [threading.Thread(target=self._serve)]
        self._threads[0].start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            self.accepted += 1
            self._threads.append(threading.Thread(target=self._answer, args=(connection,)))
            self._threads[-1].start()

    def _answer(self, connection: socket.socket) -> None:
        with connection:
            try:
                while data := connection.recv(65536):
                    self.received_bytes += len(data)
                    connection.sendall(data)
            except OSError:
                pass

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for thread in self._threads:
            thread.join(10)


@pytest.fixture
def echo() -> Iterator[Echo]:
    with closing(Echo()) as echo:
        yield echo


@contextmanager
def dialled(made: ChaosProxy) -> Iterator[socket.socket]:
    with socket.create_connection((made.host, made.port), 5) as connection:
        yield connection


def exchange(connection: socket.socket, data: bytes) -> bytes:
    connection.sendall(data)
    return receive(connection, len(data))


def receive(connection: socket.socket, size: int) -> bytes:
    got = b""
    while len(got) < size and (piece := connection.recv(size - len(got))):
        got += piece
    return got


def test_a_proxy_left_alone_is_a_wire(echo: Echo) -> None:
    data = bytes(range(256)) * 4096
    with proxy(echo.address) as made, dialled(made) as connection:
        sender = threading.Thread(target=connection.sendall, args=(data,))
        sender.start()
        assert receive(connection, len(data)) == data
        sender.join()
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1) == b""


def test_a_proxy_delays_and_narrows(echo: Echo) -> None:
    with proxy(echo.address) as made, dialled(made) as connection:
        made.there.delay_s = made.back.delay_s = 0.1
        started_s = time.monotonic()
        assert exchange(connection, b"x") == b"x"
        assert time.monotonic() - started_s >= 0.2
        made.heal()
        made.there.bytes_per_s = 200_000
        started_s = time.monotonic()
        assert len(exchange(connection, bytes(60_000))) == 60_000
        assert time.monotonic() - started_s >= 0.25


def test_a_cut_closes_nothing_and_loses_nothing(echo: Echo) -> None:
    with proxy(echo.address) as made, dialled(made) as connection:
        assert exchange(connection, b"before") == b"before"
        made.cut()
        connection.settimeout(NOBODY_S)
        with pytest.raises(TimeoutError):
            exchange(connection, b"meanwhile")
        with dialled(made) as other:
            other.settimeout(NOBODY_S)
            with pytest.raises(TimeoutError):
                exchange(other, b"hello?")
        made.heal()
        connection.settimeout(5)
        assert receive(connection, 9) == b"meanwhile"


@pytest.mark.parametrize("lane", ["there", "back"])
def test_one_way_is_one_way(echo: Echo, lane: str) -> None:
    with proxy(echo.address) as made, dialled(made) as connection:
        exchange(connection, b"x")
        carried = made.there.carried_bytes
        getattr(made, lane).blocked = True
        connection.settimeout(NOBODY_S)
        with pytest.raises(TimeoutError):
            exchange(connection, b"y")
        assert made.there.carried_bytes - carried == (lane == "back")


def test_a_reset_is_seen_at_once_and_who_is_refused_is_not_carried(echo: Echo) -> None:
    with proxy(echo.address) as made:
        with dialled(made) as connection:
            exchange(connection, b"x")
            made.reset()
            with pytest.raises(ConnectionResetError):
                connection.recv(1)
        made.refusing = True
        # As early as while it connects.
        with pytest.raises(ConnectionResetError), dialled(made) as refused:
            refused.recv(1)
        assert echo.accepted == 1
        made.heal()
        with dialled(made) as connection:
            assert exchange(connection, b"x") == b"x"


def test_one_byte_is_corrupted_and_it_is_the_one_that_was_meant(echo: Echo) -> None:
    with proxy(echo.address) as made, dialled(made) as connection:
        made.there.corrupt_in_bytes = 5
        got = exchange(connection, b"abc") + exchange(connection, b"defg") + exchange(connection, b"hij")
        assert [at for at, (a, b) in enumerate(zip(got, b"abcdefghij", strict=True)) if a != b] == [5]


def test_a_way_drops_what_it_must_and_keeps_the_order() -> None:
    assert Way(up=False).arrival_s(1, 0.0) is None
    assert Way(loss=1.0).arrival_s(1, 0.0) is None
    assert Way(delay_s=0.5).arrival_s(1, 2.0) == 2.5
    narrow = Way(rate_bytes_per_s=1000.0)
    arrivals = [narrow.arrival_s(50, 0.0) for _ in range(10)]
    assert arrivals[:5] == pytest.approx([0.05, 0.1, 0.15, 0.2, 0.25])
    assert None in arrivals[5:], f"what waits for more than {QUEUE_S} s is dropped"
    shaky = Way(delay_s=0.03, jitter_s=0.03)
    times = [shaky.arrival_s(100, at / 1000) for at in range(200)]
    assert all(time is not None for time in times)
    assert times == sorted(times, key=lambda time: time or 0.0)
    assert len({round((time or 0.0) - at / 1000, 4) for at, time in enumerate(times)}) > 50
    lossy = Way(loss=0.5)
    assert 50 < sum(lossy.arrival_s(1, 0.0) is None for _ in range(200)) < 150


@pytest.fixture(scope="module")
def net() -> Iterator[Network]:
    if reason := why_not():
        pytest.skip(reason)
    with network(["a", "b", "c"]) as net:
        yield net


@pytest.fixture
def healed(net: Network) -> Network:
    net.heal()
    return net


@pytest.fixture
def far_echo(healed: Network) -> Iterator[Echo]:
    with closing(Echo(healed.hosts["b"])) as echo:
        yield echo


def call(net: Network, name: str, to: Echo, timeout_s: float = 5.0) -> socket.socket:
    def connect() -> socket.socket:
        net.hosts[name].enter()
        return socket.create_connection(to.address, timeout_s)

    return in_thread(connect)


def test_hosts_reach_each_other_and_nobody_else(healed: Network, far_echo: Echo) -> None:
    data = bytes(range(256)) * 1024
    with call(healed, "a", far_echo) as connection:
        assert exchange(connection, data[:1000]) == data[:1000]
        sender = threading.Thread(target=connection.sendall, args=(data,))
        sender.start()
        assert receive(connection, len(data)) == data
        sender.join()

    def leave() -> None:
        healed.hosts["a"].enter()
        socket.create_connection(("192.0.2.1", 9), NOBODY_S).close()

    with pytest.raises(OSError, match="unreachable"):
        in_thread(leave)


def test_a_partition_is_healed_by_tcp_and_others_do_not_notice(healed: Network, far_echo: Echo) -> None:
    with call(healed, "a", far_echo) as connection, call(healed, "c", far_echo) as other:
        healed.between("a", "b", up=False)
        connection.settimeout(NOBODY_S)
        with pytest.raises(TimeoutError):
            exchange(connection, b"x")
        assert exchange(other, b"y") == b"y"
        healed.between("a", "b", up=True)
        connection.settimeout(10)
        assert receive(connection, 1) == b"x"


@pytest.mark.parametrize(("src", "dst", "arrives"), [("a", "b", False), ("b", "a", True)])
def test_one_way_of_a_link(healed: Network, far_echo: Echo, src: str, dst: str, arrives: bool) -> None:
    """Over the good way data arrives; then it is the acknowledgement that is lost."""
    with call(healed, "a", far_echo) as connection:
        exchange(connection, b"x")
        healed.between(src, dst, back=False, up=False)
        connection.sendall(b"y")
        time.sleep(NOBODY_S)
        assert far_echo.received_bytes == 1 + arrives
        assert _unacknowledged(connection) > 0
        healed.heal()
        connection.settimeout(10)
        assert receive(connection, 1) == b"y"


def _unacknowledged(connection: socket.socket) -> int:
    """Segments that are sent and not acknowledged, from the kernel's TCP_INFO."""
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
    return int(struct.unpack_from("I", info, 24)[0])


def test_delay_and_rate(healed: Network, far_echo: Echo) -> None:
    with call(healed, "a", far_echo) as connection:
        healed.between("a", "b", delay_s=0.05)
        started_s = time.monotonic()
        exchange(connection, b"x")
        assert time.monotonic() - started_s >= 0.1
        healed.between("a", "b", delay_s=0.0, rate_bytes_per_s=500_000.0)
        started_s = time.monotonic()
        assert len(exchange(connection, bytes(100_000))) == 100_000
        assert time.monotonic() - started_s >= 0.15


def test_what_is_lost_is_sent_again(healed: Network, far_echo: Echo) -> None:
    data = bytes(range(256)) * 400
    with call(healed, "a", far_echo, 20) as connection:
        healed.between("a", "b", loss=0.05, delay_s=0.005, jitter_s=0.005)
        assert exchange(connection, data) == data


def test_a_host_behind_nat_calls_and_is_not_called(healed: Network, far_echo: Echo) -> None:
    healed.close_in("b")
    with pytest.raises(TimeoutError):
        call(healed, "a", far_echo, NOBODY_S)
    with closing(Echo(healed.hosts["a"])) as near, call(healed, "b", near) as connection:
        assert exchange(connection, b"out and back") == b"out and back"


def test_a_program_runs_on_a_host_and_a_proxy_leads_in(healed: Network) -> None:
    """The loopback device of a namespace is its own: what listens there is reached from inside only."""
    host = healed.hosts["c"]
    program = (
        "import socket; s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True);"
        "c, _ = s.accept(); c.sendall(b'hello')"
    )
    with subprocess.Popen([*host.launcher, sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as inside:
        assert inside.stdout is not None
        port = int(inside.stdout.readline())
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), 1)
        with proxy(("127.0.0.1", port), host.enter) as made, dialled(made) as connection:
            assert receive(connection, 5) == b"hello"
