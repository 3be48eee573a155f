"""What a peer link costs beside a raw blocking socket: CPU per byte, and the round trip of a small frame.

Two processes per contender, both pinned on one core, the same congestion control on both contenders, rounds interleaved
in changing order. `raw` is a blocking socket: u32 length prefix, one sendmsg, recv_into a reused buffer. `link` is the
whole path a daemon uses: `Link.send` to the frame handler, uvloop, malloc tuned, credits on. Payloads flow from the
listener to the dialer, the direction in which websocket frames are not masked. CPU is user + system of both processes.
A fraction is raw CPU divided by link CPU of the same round; the table shows medians.

Pings come first, on fresh connections: a raw socket that has just carried 4 MiB messages takes about a fifth longer for
a round trip, which would flatter the link, whose control socket carries none.

    scripts/bench_wire.py [--rounds 7] [--json results.json]

Exit status 1 if a requirement fails: fraction >= 0.35 at 256 KiB and 4 MiB, 8 KiB round trip <= 2.5 x raw.
"""

import argparse
import asyncio
import json
import os
import random
import socket
import statistics
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from helixd.ids import Incarnation, PeerId
from helixd.wire.endpoint import Endpoint
from helixd.wire.link import Frame, FrameHandler, Link
from helixd.wire.options import WireOptions
from helixd.wire.peers import PeerIdentity
from helixd.wire.tuning import install_uvloop, tune_malloc

KIB = 1024
SIZES = {8 * KIB: 20000, 256 * KIB: 3000, 4096 * KIB: 250}
PING_BYTES = 8 * KIB
PINGS = 4000
REQUIRED_FRACTION = 0.35
REQUIRED_SIZES = (256 * KIB, 4096 * KIB)
REQUIRED_RTT_RATIO = 2.5
CONTENDERS = ("raw", "link")
DATA, MARK, PING = 1, 2, 3
SECRET = b"a secret that is only for benches"


def congestion_control() -> str | None:
    """cubic where this kernel has it, so that loopback is not paced."""
    with socket.socket() as sock:
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"cubic")
        except (OSError, AttributeError):
            return None
    return "cubic"


def say(line: dict[str, Any]) -> None:
    """One line of JSON to the parent process."""
    print(json.dumps(line), flush=True)


def percentiles(times_s: list[float]) -> dict[str, float]:
    """Median and 99th percentile in microseconds."""
    ordered = sorted(times_s)
    return {"p50_us": ordered[len(ordered) // 2] * 1e6, "p99_us": ordered[len(ordered) * 99 // 100] * 1e6}


class RawSocket:
    """Length-prefixed messages over a blocking socket."""

    def __init__(self, sock: socket.socket, algorithm: str | None) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if algorithm:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, algorithm.encode())
        self.sock = sock
        self.buffer = memoryview(bytearray(max(SIZES)))
        self.prefix = memoryview(bytearray(4))

    def send(self, payload: memoryview) -> None:
        """One message."""
        prefix = struct.pack("!I", payload.nbytes)
        sent = self.sock.sendmsg([prefix, payload]) - len(prefix)
        if sent < payload.nbytes:
            self.sock.sendall(payload[sent:])

    def receive(self) -> memoryview:
        """The next message, in a buffer that the one after it overwrites."""
        self._fill(self.prefix)
        view = self.buffer[: struct.unpack("!I", self.prefix)[0]]
        self._fill(view)
        return view

    def _fill(self, view: memoryview) -> None:
        filled = 0
        while filled < view.nbytes:
            count = self.sock.recv_into(view[filled:])
            if count == 0:
                raise ConnectionError("the other process is gone")
            filled += count


def raw_listener(algorithm: str | None) -> None:
    """Answer pings, send floods."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        say({"port": server.getsockname()[1]})
        raw = RawSocket(server.accept()[0], algorithm)
        for _ in range(PINGS):
            raw.send(raw.receive())
        for size, messages in SIZES.items():
            payload = memoryview(os.urandom(size))
            for _ in range(messages // 10):
                raw.send(payload)
            raw.receive()
            started = time.process_time()
            for _ in range(messages):
                raw.send(payload)
            raw.receive()
            say({"size": size, "cpu_s": time.process_time() - started})


def raw_dialer(port: int, algorithm: str | None) -> None:
    """Send pings, receive floods."""
    raw = RawSocket(socket.create_connection(("127.0.0.1", port)), algorithm)
    times_s, payload = [], memoryview(os.urandom(PING_BYTES))
    for _ in range(PINGS):
        started_s = time.perf_counter()
        raw.send(payload)
        raw.receive()
        times_s.append(time.perf_counter() - started_s)
    say(percentiles(times_s))
    token = memoryview(b"done")
    for size, messages in SIZES.items():
        for _ in range(messages // 10):
            raw.receive()
        started, started_s = time.process_time(), time.perf_counter()
        raw.send(token)
        for _ in range(messages):
            raw.receive()
        say({"size": size, "cpu_s": time.process_time() - started, "wall_s": time.perf_counter() - started_s})
        raw.send(token)


def endpoint(name: str, algorithm: str | None, handler: FrameHandler, up: "asyncio.Future[Link]") -> Endpoint:
    """A daemon's peer endpoint whose only link becomes `up`."""

    def on_link(link: Link) -> FrameHandler:
        up.set_result(link)
        return handler

    options = WireOptions(congestion_control=algorithm)
    identity = PeerIdentity(PeerId(name), Incarnation(1))
    return Endpoint(identity, options, SECRET, lambda *_: None, on_link, lambda *_: None)


async def link_listener(algorithm: str | None) -> None:
    """Answer pings, send floods."""
    marks: asyncio.Queue[int] = asyncio.Queue()

    async def handler(link: Link, frame: Frame) -> None:
        if frame.kind == PING:
            await link.send(frame)
        else:
            marks.put_nowait(frame.kind)

    up: asyncio.Future[Link] = asyncio.get_running_loop().create_future()
    async with endpoint("listener", algorithm, handler, up) as here:
        say({"port": (await here.listen("127.0.0.1", 0))[1]})
        link = await up
        await marks.get()
        for size, messages in SIZES.items():
            frame = Frame(DATA, [1, 2, 3, 4, 5, 6], memoryview(os.urandom(size)))
            for _ in range(messages // 10):
                await link.send(frame)
            await marks.get()
            started = time.process_time()
            for _ in range(messages):
                await link.send(frame)
            await marks.get()
            say({"size": size, "cpu_s": time.process_time() - started})


async def link_dialer(port: int, algorithm: str | None) -> None:
    """Send pings, receive floods."""
    loop = asyncio.get_running_loop()
    missing, arrived = 0, loop.create_future()

    async def handler(_: Link, __: Frame) -> None:
        nonlocal missing
        missing -= 1
        if missing == 0:
            arrived.set_result(None)

    async def arrive(count: int) -> None:
        nonlocal missing, arrived
        missing += count
        if missing > 0:
            await arrived
        arrived = loop.create_future()

    up: asyncio.Future[Link] = asyncio.get_running_loop().create_future()
    async with endpoint("dialer", algorithm, handler, up) as here:
        link = await here.dial("127.0.0.1", port, 5.0)
        mark = Frame(MARK, None)
        times_s, ping = [], Frame(PING, [1, 2, 3, 4, 5, 6], memoryview(os.urandom(PING_BYTES)))
        for _ in range(PINGS):
            started_s = time.perf_counter()
            await link.send(ping)
            await arrive(1)
            times_s.append(time.perf_counter() - started_s)
        say(percentiles(times_s))
        await link.send(mark)
        for size, messages in SIZES.items():
            await arrive(messages // 10)
            started, started_s = time.process_time(), time.perf_counter()
            await link.send(mark)
            await arrive(messages)
            say({"size": size, "cpu_s": time.process_time() - started, "wall_s": time.perf_counter() - started_s})
            await link.send(mark)


def run_child(role: str, port: int, core: int, algorithm: str | None) -> None:
    """One process of one contender."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {core})
    if role.startswith("raw"):
        raw_listener(algorithm) if role == "raw-listener" else raw_dialer(port, algorithm)
        return
    tune_malloc()
    install_uvloop()
    asyncio.run(link_listener(algorithm) if role == "link-listener" else link_dialer(port, algorithm))


def run_pair(contender: str, core: int, algorithm: str | None) -> dict[str, Any]:
    """Both processes once; `{size: {cpu_us, gb_per_s}, "ping": ...}`."""

    def start(role: str, port: int) -> "subprocess.Popen[str]":
        command = [sys.executable, __file__, "--child", role, "--port", str(port), "--core", str(core)]
        command += ["--congestion", algorithm] if algorithm else []
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    with start(f"{contender}-listener", 0) as listener:
        if listener.stdout is None:
            raise RuntimeError("no pipe from the listener")
        port = json.loads(listener.stdout.readline())["port"]
        with start(f"{contender}-dialer", port) as dialer:
            received = [json.loads(line) for line in dialer.stdout or ()]
        sent = [json.loads(line) for line in listener.stdout]
    if listener.returncode or dialer.returncode:
        raise RuntimeError(f"{contender}: a process failed ({listener.returncode}, {dialer.returncode})")
    result: dict[str, Any] = {"ping": received[0]}
    for tx, rx in zip(sent, received[1:], strict=True):
        messages = SIZES[tx["size"]]
        result[str(tx["size"])] = {
            "cpu_tx_us": tx["cpu_s"] / messages * 1e6,
            "cpu_rx_us": rx["cpu_s"] / messages * 1e6,
            "gb_per_s": tx["size"] * messages / rx["wall_s"] / 1e9,
        }
    return result


def summarise(rounds: list[dict[str, dict[str, Any]]]) -> tuple[list[dict[str, Any]], bool]:
    """Medians over the rounds, and whether every requirement holds."""
    rows, passed = [], True
    for size in SIZES:
        cells = [{name: each[name][str(size)] for name in CONTENDERS} for each in rounds]

        def cpu_us(cell: dict[str, float]) -> float:
            return cell["cpu_tx_us"] + cell["cpu_rx_us"]

        row: dict[str, Any] = {"bytes": size}
        row["fraction"] = statistics.median(cpu_us(cell["raw"]) / cpu_us(cell["link"]) for cell in cells)
        for name in CONTENDERS:
            for key in ("cpu_tx_us", "cpu_rx_us", "gb_per_s"):
                row[f"{name}_{key}"] = statistics.median(cell[name][key] for cell in cells)
        row["required"] = REQUIRED_FRACTION if size in REQUIRED_SIZES else None
        passed &= row["required"] is None or row["fraction"] >= row["required"]
        rows.append(row)
    ratio = statistics.median(each["link"]["ping"]["p50_us"] / each["raw"]["ping"]["p50_us"] for each in rounds)
    row = {"bytes": PING_BYTES, "rtt_ratio": ratio, "required": REQUIRED_RTT_RATIO}
    for name in CONTENDERS:
        for key in ("p50_us", "p99_us"):
            row[f"{name}_{key}"] = statistics.median(each[name]["ping"][key] for each in rounds)
    rows.append(row)
    return rows, passed and ratio <= REQUIRED_RTT_RATIO


def show(rows: list[dict[str, Any]]) -> None:
    """The table."""
    print(f"{'bytes':>9}  {'raw cpu tx+rx us':>18}  {'link cpu tx+rx us':>18}  {'raw GB/s':>8}  {'link GB/s':>9}  frac")
    for row in rows[:-1]:
        need = f" (>= {row['required']})" if row["required"] else ""
        print(
            f"{row['bytes']:>9}  {row['raw_cpu_tx_us']:>8.1f} + {row['raw_cpu_rx_us']:<7.1f}  "
            f"{row['link_cpu_tx_us']:>8.1f} + {row['link_cpu_rx_us']:<7.1f}  {row['raw_gb_per_s']:>8.2f}  "
            f"{row['link_gb_per_s']:>9.2f}  {row['fraction']:.2f}{need}"
        )
    row = rows[-1]
    print(
        f"round trip of {row['bytes']} bytes: raw p50 {row['raw_p50_us']:.1f} p99 {row['raw_p99_us']:.1f} us, "
        f"link p50 {row['link_p50_us']:.1f} p99 {row['link_p99_us']:.1f} us, "
        f"ratio {row['rtt_ratio']:.2f} (<= {row['required']})"
    )


def main() -> int:
    """Run the rounds, print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7, help="how often each contender runs (default 7)")
    parser.add_argument("--core", type=int, default=max(os.sched_getaffinity(0)), help="both processes run on it")
    parser.add_argument("--json", type=Path, help="write the medians and every round to this file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--congestion", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        run_child(arguments.child, arguments.port, arguments.core, arguments.congestion)
        return 0
    algorithm = congestion_control()
    rounds = []
    for number in range(arguments.rounds):
        order = list(CONTENDERS)
        random.Random(number).shuffle(order)
        rounds.append({name: run_pair(name, arguments.core, algorithm) for name in order})
    rows, passed = summarise(rounds)
    print(f"core {arguments.core}, congestion control {algorithm or 'system default'}, {arguments.rounds} rounds")
    show(rows)
    if arguments.json:
        report = {"core": arguments.core, "congestion": algorithm, "passed": passed, "medians": rows, "rounds": rounds}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    print("requirements hold" if passed else "a requirement does NOT hold")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
