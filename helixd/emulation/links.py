"""Links shaped to a cluster file: one message at a time per link, for bytes / bandwidth, then the latency passes.

The rules of the paper's simulator, on the event loop's clock. A node's network card bounds each of its links, but
links do not share it.
"""

import asyncio
from collections import deque
from collections.abc import Callable

from helixd.ids import NodeId
from helixd.plan.spec import COORDINATOR, ClusterSpec
from helixd.worker.shaping import LinkFigures

# What may wait for a slow link before prefill holds back, as in an outbox.
SOFT_BYTES = 32 << 20


class Lane:
    """One direction of one link, in order. Bounded by its users: they hold back while `waiting_bytes` is large."""

    def __init__(self, bandwidth_bytes_per_s: float, latency_s: float, on_drained: Callable[[], None]) -> None:
        self.waiting_bytes = 0
        self._bandwidth_bytes_per_s = bandwidth_bytes_per_s
        self._latency_s = latency_s
        self._on_drained = on_drained
        self._free_at_s = 0.0
        self._crossing: deque[tuple[float, int, Callable[[], None]]] = deque()
        self._timer: asyncio.TimerHandle | None = None

    def carry(self, size_bytes: int, arrive: Callable[[], None]) -> None:
        """Let a message cross; `arrive` is called when it has."""
        loop = asyncio.get_running_loop()
        self._free_at_s = max(loop.time(), self._free_at_s) + size_bytes / self._bandwidth_bytes_per_s
        self._crossing.append((self._free_at_s + self._latency_s, size_bytes, arrive))
        self.waiting_bytes += size_bytes
        if self._timer is None:
            self._timer = loop.call_at(self._crossing[0][0], self._arrived)

    def _arrived(self) -> None:
        loop = asyncio.get_running_loop()
        was_full = self.waiting_bytes > SOFT_BYTES
        while self._crossing and self._crossing[0][0] <= loop.time():
            _, size_bytes, arrive = self._crossing.popleft()
            self.waiting_bytes -= size_bytes
            arrive()
        self._timer = loop.call_at(self._crossing[0][0], self._arrived) if self._crossing else None
        if was_full and self.waiting_bytes <= SOFT_BYTES:
            self._on_drained()


class ShapedLinks:
    """A `Shaping` for one node of a cluster. Times are those of the file, times `time_scale`."""

    def __init__(self, spec: ClusterSpec, me: NodeId, time_scale: float, on_drained: Callable[[], None]) -> None:
        nic_out = {node.id: node.nic_out_bytes_per_s for node in spec.nodes}
        nic_in = {node.id: node.nic_in_bytes_per_s for node in spec.nodes}
        nic_out[COORDINATOR], nic_in[COORDINATOR] = (
            spec.coordinator_nic_out_bytes_per_s, spec.coordinator_nic_in_bytes_per_s,
        )  # fmt: skip
        self._out: dict[NodeId, Lane] = {}
        self._figures: dict[NodeId, LinkFigures] = {}
        self._in: Lane | None = None
        back = {link.src: link.latency_s for link in spec.links if link.dst == me}
        for link in spec.links:
            rates = [link.bandwidth_bytes_per_s, nic_out.get(link.src), nic_in.get(link.dst)]
            rate = min(each for each in rates if each is not None) / time_scale
            if rate <= 0:
                continue
            lane = Lane(rate, link.latency_s * time_scale, on_drained)
            if link.src == me:
                self._out[link.dst] = lane
                rtt_s = (link.latency_s + back.get(link.dst, link.latency_s)) * time_scale
                self._figures[link.dst] = LinkFigures(rtt_s, rate)
            elif link.src == COORDINATOR and link.dst == me:
                self._in = lane

    def outward(self, node: NodeId | None, size_bytes: int, send: Callable[[], None]) -> None:
        """See `Shaping`. What has no link in the file goes as the socket lets it: the plan does not use it."""
        lane = self._out.get(node or COORDINATOR)
        if lane is None:
            send()
        else:
            lane.carry(size_bytes, send)

    def inward(self, size_bytes: int, handle: Callable[[], None]) -> None:
        """See `Shaping`."""
        if self._in is None:
            handle()
        else:
            self._in.carry(size_bytes, handle)

    def congested(self, node: NodeId | None) -> bool:
        """See `Shaping`."""
        lane = self._out.get(node or COORDINATOR)
        return lane is not None and lane.waiting_bytes > SOFT_BYTES

    def figures(self, node: NodeId | None) -> LinkFigures | None:
        """See `Shaping`."""
        return self._figures.get(node or COORDINATOR)
