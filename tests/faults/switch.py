"""A network between hosts as a process: it carries IP packets between TUN devices, as fast and as surely as it is told.

Kernels that tests meet have no `netem`. Arguments: the descriptors of the devices, of hosts 0, 1, ... in turn, whose
addresses end in 1, 2, ... Each line of standard input is a list of changes as JSON, answered with a line once they are
in force. It ends with its standard input.
"""

import asyncio
import contextlib
import json
import os
import random
import sys
from dataclasses import dataclass

QUEUE_S = 0.2
"""What waits at a narrow place for longer than this is dropped, as by a router."""
PACKET_BYTES = 65536
READS_PER_TURN = 64
TCP, SYN, ACK = 6, 0x02, 0x10


@dataclass(slots=True)
class Way:
    """From one host to another. `rate_bytes_per_s` 0: as fast as it can. `jitter_s` either side of `delay_s`."""

    up: bool = True
    delay_s: float = 0.0
    jitter_s: float = 0.0
    loss: float = 0.0
    rate_bytes_per_s: float = 0.0
    free_at_s: float = 0.0
    last_at_s: float = 0.0

    def arrival_s(self, size_bytes: int, now_s: float) -> float | None:
        """When a packet that is sent now arrives; None if it is lost. Packets keep their order."""
        if not self.up or (self.loss and random.random() < self.loss):
            return None
        starts_s = max(self.free_at_s, now_s)
        if self.rate_bytes_per_s:
            if starts_s - now_s > QUEUE_S:
                return None
            self.free_at_s = starts_s = starts_s + size_bytes / self.rate_bytes_per_s
        jitter_s = random.uniform(-self.jitter_s, self.jitter_s) if self.jitter_s else 0.0
        self.last_at_s = max(self.last_at_s, starts_s + max(0.0, self.delay_s + jitter_s))
        return self.last_at_s


class Switch:
    """`closed` hosts are as behind NAT: connections can be made from them, not to them."""

    def __init__(self, devices: list[int], loop: asyncio.AbstractEventLoop) -> None:
        self.ways = {(src, dst): Way() for src in range(len(devices)) for dst in range(len(devices)) if src != dst}
        self.closed: set[int] = set()
        self._devices = devices
        self._loop = loop
        for number, device in enumerate(devices):
            os.set_blocking(device, False)
            loop.add_reader(device, self._read, number, device)

    def change(self, changes: list[dict[str, object]]) -> None:
        """Each names `ways` (pairs of hosts) and what they are like from now on, or the `closed` hosts."""
        for change in changes:
            if "closed" in change:
                self.closed = set(change.pop("closed"))  # type: ignore[call-overload]
            for src, dst in change.pop("ways", ()):  # type: ignore[attr-defined]
                for name, value in change.items():
                    setattr(self.ways[src, dst], name, value)

    def _read(self, src: int, device: int) -> None:
        for _ in range(READS_PER_TURN):
            try:
                packet = os.read(device, PACKET_BYTES)
            except BlockingIOError:
                return
            self._carry(src, packet)

    def _carry(self, src: int, packet: bytes) -> None:
        dst = packet[19] - 1 if packet[0] >> 4 == 4 and len(packet) >= 20 else -1
        way = self.ways.get((src, dst))
        if way is None or (dst in self.closed and _connects(packet)):
            return
        now_s = self._loop.time()
        at_s = way.arrival_s(len(packet), now_s)
        if at_s is None:
            return
        if at_s <= now_s:
            self._write(self._devices[dst], packet)
        else:
            self._loop.call_at(at_s, self._write, self._devices[dst], packet)

    def _write(self, device: int, packet: bytes) -> None:
        with contextlib.suppress(BlockingIOError):  # lost, as in any full queue
            os.write(device, packet)


def _connects(packet: bytes) -> bool:
    """Whether it asks for a new TCP connection."""
    flags_at = (packet[0] & 15) * 4 + 13
    return packet[9] == TCP and len(packet) > flags_at and packet[flags_at] & (SYN | ACK) == SYN


async def main(devices: list[int]) -> None:
    loop = asyncio.get_running_loop()
    switch = Switch(devices, loop)
    commands = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    print("ready", flush=True)
    while line := await commands.readline():
        switch.change(json.loads(line))
        print("done", flush=True)


if __name__ == "__main__":
    asyncio.run(main([int(word) for word in sys.argv[1:]]))
