"""Links of the simulated network: one message at a time, its bytes first, the latency after, in order.

A message's arrival is known when it is sent, so it costs no event: it lies in the wire until its receiver looks.
"""

from collections import deque
from collections.abc import Callable, Mapping
from typing import Protocol

from helixd.ids import NodeId
from helixd.plan.spec import COORDINATOR, ClusterSpec
from helixd.sim.job import Job
from helixd.sim.world import World

Edge = tuple[NodeId, NodeId]


class Receiver(Protocol):
    """Who looks into a wire. `asleep_until_s`: when it will look next by itself; minus infinity while it is busy."""

    asleep_until_s: float

    def wake(self, at_s: float) -> None:
        """Look into the wires, unless that has happened since."""
        ...


class Wire:
    """A directed link. Its end towards the coordinator delivers at once by `deliver`; others are looked into."""

    __slots__ = (
        "bytes_sent", "deliver", "dst", "entry", "free_s", "latency_s", "queue", "receiver", "row_s", "src", "token_s",
        "_world",
    )  # fmt: skip

    def __init__(
        self, world: World, src: NodeId, dst: NodeId, bytes_per_s: float, latency_s: float, token_bytes: float,
        entry: int = 0,
    ) -> None:  # fmt: skip
        self._world = world
        self.src, self.dst = src, dst
        self.row_s = token_bytes / bytes_per_s
        self.latency_s = latency_s
        self.free_s = 0.0
        self.entry = entry
        self.queue: deque[tuple[float, Job, int]] = deque()
        self.receiver: Receiver | None = None
        self.deliver: Callable[[Job], None] | None = None
        self.bytes_sent = 0.0

    def send(self, job: Job, rows: int) -> None:
        """Put a pass on the wire: `rows` prompt rows, or 0 for a decode pass."""
        world = self._world
        free_s = self.free_s
        now_s = world.now_s
        if free_s < now_s:
            free_s = now_s
        free_s += self.row_s * rows if rows else self.row_s
        self.free_s = free_s
        arrives_s = free_s + self.latency_s
        receiver = self.receiver
        if receiver is None:
            assert self.deliver is not None
            world.at(arrives_s, self.deliver, job)
            return
        self.queue.append((arrives_s, job, rows))
        if arrives_s < receiver.asleep_until_s:
            receiver.asleep_until_s = arrives_s
            world.at(arrives_s, receiver.wake, arrives_s)


def make_wires(world: World, spec: ClusterSpec, rates: Mapping[Edge, float], entries: Mapping[Edge, int]) -> dict[Edge, Wire]:
    """The wires of these edges. `rates`: bytes/s of each; `entries`: the layer at which a pass enters the receiver."""
    latency = {(link.src, link.dst): link.latency_s for link in spec.links}
    model = spec.model
    return {
        edge: Wire(
            world, edge[0], edge[1], rate, latency[edge],
            model.token_bytes if COORDINATOR in edge else model.activation_bytes, entries.get(edge, 0),
        )
        for edge, rate in rates.items()
    }  # fmt: skip
