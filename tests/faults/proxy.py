"""A TCP proxy that does to connections what networks do: delay, narrow, cut, hold one way, reset, refuse, corrupt.

It runs an event loop of its own in a thread: tests with and without one change its settings at any time. With `enter`,
the connections it makes are another host's (`tests.faults.namespaces`).
"""

import asyncio
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

PIECE_BYTES = 16 << 10
PIECES = 64
"""What a lane holds that has been read and not written: what is on the way."""


@dataclass(slots=True)
class Lane:
    """One direction. `blocked`: nothing passes and nothing closes. `corrupt_in_bytes`: after so many, one is wrong."""

    delay_s: float = 0.0
    bytes_per_s: float = float("inf")
    blocked: bool = False
    corrupt_in_bytes: int | None = None
    carried_bytes: int = 0

    def spoil(self, data: bytes) -> bytes:
        if self.corrupt_in_bytes is None:
            return data
        at = self.corrupt_in_bytes
        if at >= len(data):
            self.corrupt_in_bytes -= len(data)
            return data
        self.corrupt_in_bytes = None
        return data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :]


@dataclass(slots=True, eq=False)
class _Call:
    """A connection through the proxy."""

    near: asyncio.StreamWriter
    far: asyncio.StreamWriter
    tasks: list[asyncio.Task[None]] = field(default_factory=list)


class ChaosProxy:
    """Use `proxy(target)`. `there` leads to the target, `back` from it. `refusing`: new connections are reset."""

    def __init__(self, target: tuple[str, int], enter: Callable[[], None]) -> None:
        self.there = Lane()
        self.back = Lane()
        self.refusing = False
        self._target = target
        self._enter = enter
        self._calls: set[_Call] = set()
        self._accepting: set[asyncio.Task[None]] = set()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self._loop: asyncio.AbstractEventLoop
        self._changed: asyncio.Event

    @property
    def host(self) -> str:
        return "127.0.0.1"

    @property
    def port(self) -> int:
        return int(self._listener.getsockname()[1])

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    @property
    def open_connections(self) -> int:
        return len(self._calls)

    def cut(self) -> None:
        """As when a cable is pulled: no byte passes, new connections are taken and lead nowhere."""
        self.there.blocked = self.back.blocked = True

    def heal(self) -> None:
        """Undo everything; what was on the way goes on."""
        for lane in (self.there, self.back):
            lane.delay_s, lane.bytes_per_s, lane.blocked, lane.corrupt_in_bytes = 0.0, float("inf"), False, None
        self.refusing = False
        self._loop.call_soon_threadsafe(self._wake)

    def reset(self) -> None:
        """Both ends of every connection get a reset."""

        def now() -> None:
            for call in list(self._calls):
                self._end(call, abruptly=True)

        self._loop.call_soon_threadsafe(now)

    def run(self, ready: threading.Event, stop: threading.Event) -> None:
        self._enter()
        asyncio.run(self._serve(ready, stop))

    async def _serve(self, ready: threading.Event, stop: threading.Event) -> None:
        self._loop, self._changed = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._accept, sock=self._listener)
        ready.set()
        while not stop.is_set():
            await asyncio.sleep(0.05)
        server.close()
        for task in self._accepting:
            task.cancel()
        for call in list(self._calls):
            self._end(call, abruptly=True)
        await asyncio.sleep(0)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._accepting.add(task)
        task.add_done_callback(self._accepting.discard)
        if self.refusing:
            _reset(writer)
            return
        try:
            while self.there.blocked:
                await self._changed.wait()
            far_reader, far = await asyncio.open_connection(*self._target)
        except (OSError, asyncio.CancelledError):
            _reset(writer)
            return
        call = _Call(writer, far)
        self._calls.add(call)
        for source, target, lane in ((reader, far, self.there), (far_reader, writer, self.back)):
            on_the_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(PIECES)
            call.tasks.append(asyncio.create_task(self._take(call, source, lane, on_the_way)))
            call.tasks.append(asyncio.create_task(self._give(call, target, lane, on_the_way)))

    async def _take(
        self, call: _Call, source: asyncio.StreamReader, lane: Lane, on_the_way: asyncio.Queue[tuple[float, bytes]]
    ) -> None:
        free_at_s = 0.0
        try:
            while True:
                data = await source.read(PIECE_BYTES)
                now_s = self._loop.time()
                free_at_s = max(free_at_s, now_s) + len(data) / lane.bytes_per_s
                await on_the_way.put((free_at_s + lane.delay_s, data))
                if not data:
                    return
                if free_at_s - now_s > 0.1:
                    await asyncio.sleep(free_at_s - now_s)
        except OSError:
            self._end(call, abruptly=True)

    async def _give(
        self, call: _Call, target: asyncio.StreamWriter, lane: Lane, on_the_way: asyncio.Queue[tuple[float, bytes]]
    ) -> None:
        try:
            while True:
                due_s, data = await on_the_way.get()
                await asyncio.sleep(max(0.0, due_s - self._loop.time()))
                while lane.blocked:
                    await self._changed.wait()
                if not data:
                    target.write_eof()
                    if all(task.done() for task in call.tasks if task is not asyncio.current_task()):
                        self._end(call, abruptly=False)
                    return
                lane.carried_bytes += len(data)
                target.write(lane.spoil(data))
                await target.drain()
        except OSError:
            self._end(call, abruptly=True)

    def _end(self, call: _Call, *, abruptly: bool) -> None:
        if call not in self._calls:
            return
        self._calls.discard(call)
        for writer in (call.near, call.far):
            if abruptly:
                _reset(writer)
            else:
                writer.close()
        current = asyncio.current_task()
        for task in call.tasks:
            if task is not current:
                task.cancel()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


@contextmanager
def proxy(target: tuple[str, int], enter: Callable[[], None] = lambda: None) -> Iterator[ChaosProxy]:
    """A proxy that listens on any free port of 127.0.0.1, here, and connects to `target`."""
    made, ready, stop = ChaosProxy(target, enter), threading.Event(), threading.Event()
    thread = threading.Thread(target=made.run, args=(ready, stop), name=f"proxy to {target}")
    thread.start()
    try:
        assert ready.wait(10)
        yield made
    finally:
        stop.set()
        thread.join()


def _reset(writer: asyncio.StreamWriter) -> None:
    connection = writer.get_extra_info("socket")
    if connection is not None and connection.fileno() >= 0:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
