"""Links of the simulated network: one message at a time, its bytes first, the latency after, in order.

A message's arrival is known when it is sent, so it costs no event: it lies in the wire until its receiver looks.
"""

from collections import deque
from collections.abc import Callable, Mapping
from typing import Protocol

from helixd.ids import NodeId
from helixd.plan.cluster.spec import COORDINATOR, ClusterSpec
from helixd.sim.job import Job
from helixd.sim.world import World

PIECE_BYTES = 256 * 1024
PIECE_S = 0.004
"""Prefill rows go in pieces of so many bytes, or of as much as takes this long, whichever is more."""

Edge = tuple[NodeId, NodeId]


class Receiver(Protocol):
    """Who looks into a wire. `asleep_until_s`: when it will look next by itself; minus infinity while it is busy."""

    asleep_until_s: float

    def wake(self, at_s: float) -> None:
        """Look into the wires, unless that has happened since."""
        ...


class Wire:
    """A directed link. Its end towards the coordinator delivers at once by `deliver`; others are looked into.

    `decode_first`: passes of one row go before prefill rows that wait for the link, and prefill goes in pieces so that
    they need not wait long (our peers keep two sockets for that). Otherwise first come, first served. `frames`: passes
    of one row that are sent at one instant are one message, and arrive together. `passes` counts passes of one row.
    """

    __slots__ = (
        "_bulk",
        "_frame",
        "_piece_rows",
        "_world",
        "decode_first",
        "deliver",
        "dst",
        "entry",
        "frames",
        "free_s",
        "latency_s",
        "passes",
        "queue",
        "receiver",
        "row_s",
        "src",
    )  # fmt: skip

    def __init__(
        self, world: World, src: NodeId, dst: NodeId, bytes_per_s: float, latency_s: float, row_bytes: float,
        *, entry: int = 0, decode_first: bool = False, frames: bool = False,
    ) -> None:  # fmt: skip
        self._world = world
        self.src, self.dst = src, dst
        self.row_s = row_bytes / bytes_per_s
        self.latency_s = latency_s
        self.free_s = 0.0
        self.passes = 0
        self.entry = entry
        self.queue: deque[tuple[float, Job, int]] = deque()
        self.receiver: Receiver | None = None
        self.deliver: Callable[[Job], None] | None = None
        self.decode_first = decode_first
        self.frames = frames
        self._frame: list[Job] = []
        self._bulk: deque[tuple[Job, int]] = deque()
        # On a fast link a whole chunk takes no longer than a piece does on a slow one.
        self._piece_rows = max(1, int(max(PIECE_BYTES / row_bytes, PIECE_S / self.row_s)))

    def send(self, job: Job, rows: int) -> None:
        """Put a pass on the wire: `rows` prompt rows, or 0 for a decode pass."""
        now_s = self._world.now_s
        if self.frames:
            if not rows:
                if not self._frame:
                    self._world.at(now_s, self._send_frame)
                self._frame.append(job)
                return
            self._send_frame(None)
        free_s = self.free_s
        if free_s < now_s:
            free_s = now_s
        if rows and self.decode_first:
            bulk = self._bulk
            waits = bool(bulk)
            while rows > self._piece_rows:
                bulk.append((job, self._piece_rows))
                rows -= self._piece_rows
            bulk.append((job, rows))
            if not waits:
                self._next_piece(None)
            return
        self._put(job, rows, free_s)

    def forget(self) -> None:
        """Everything on the wire is lost."""
        self.queue.clear()
        self._bulk.clear()
        self._frame.clear()

    def _send_frame(self, _: None) -> None:
        """What was sent at this instant goes as one message."""
        jobs, self._frame = self._frame, []
        if jobs:
            self.free_s = max(self.free_s, self._world.now_s) + self.row_s * len(jobs)
            self.passes += len(jobs)
            for job in jobs:
                self._arrives(job, 0)

    def _put(self, job: Job, rows: int, free_s: float) -> None:
        if rows:
            self.free_s = free_s + self.row_s * rows
        else:
            self.free_s = free_s + self.row_s
            self.passes += 1
        self._arrives(job, rows)

    def _arrives(self, job: Job, rows: int) -> None:
        arrives_s = self.free_s + self.latency_s
        receiver = self.receiver
        if receiver is None:
            assert self.deliver is not None
            self._world.at(arrives_s, self.deliver, job)
            return
        self.queue.append((arrives_s, job, rows))
        if arrives_s < receiver.asleep_until_s:
            receiver.asleep_until_s = arrives_s
            self._world.at(arrives_s, receiver.wake, arrives_s)

    def _next_piece(self, _: None) -> None:
        """Send a waiting piece if the link is free, and come back when it is free again."""
        bulk = self._bulk
        now_s = self._world.now_s
        if bulk and self.free_s <= now_s:
            job, rows = bulk[0]
            self._put(job, rows, now_s)
            # It leaves the line when its last byte does: who comes meanwhile has to know that somebody waits.
            self._world.at(self.free_s, self._piece_done)
        elif bulk:
            self._world.at(self.free_s, self._next_piece)

    def _piece_done(self, _: None) -> None:
        if self._bulk:
            self._bulk.popleft()
            self._next_piece(None)


def make_wires(
    world: World,
    spec: ClusterSpec,
    rates: Mapping[Edge, float],
    entries: Mapping[Edge, int],
    *,
    decode_first: bool = False,
    frames: bool = False,
) -> dict[Edge, Wire]:
    """The wires of these edges. `rates`: bytes/s of each; `entries`: the layer at which a pass enters the receiver."""
    latency = {(link.src, link.dst): link.latency_s for link in spec.links}
    model = spec.model
    return {
        edge: Wire(
            world, edge[0], edge[1], rate, latency[edge],
            model.token_bytes if COORDINATOR in edge else model.activation_bytes,
            entry=entries.get(edge, 0), decode_first=decode_first, frames=frames,
        )
        for edge, rate in rates.items()
    }  # fmt: skip
