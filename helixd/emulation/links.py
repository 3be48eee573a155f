"""Links shaped to a cluster file: one message at a time per link, for bytes / bandwidth, then the latency passes.

The rules of the paper's simulator, on the event loop's clock; but decode rows go before prefill rows that wait. A
node's network card bounds each of its links, but links do not share it.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from helixd.ids import NodeId
from helixd.plan.cluster.spec import COORDINATOR, ClusterSpec
from helixd.worker.shaping import LinkFigures

# What may wait for a slow link before prefill holds back, as in an outbox.
SOFT_BYTES = 32 << 20
GRAIN_S = 0.0005
"""A link that is free so soon is free: timers are not set for less."""


class _Waiting(NamedTuple):
    since_s: float
    size_bytes: int
    arrive: Callable[[], None]


class Lane:
    """One direction of one link, in order; urgent messages go ahead of others that have not begun to cross.

    Bounded by its users: they hold back while `waiting_bytes` is large.
    """

    def __init__(self, bandwidth_bytes_per_s: float, latency_s: float, on_drained: Callable[[], None]) -> None:
        self.waiting_bytes = 0
        self._bandwidth_bytes_per_s = bandwidth_bytes_per_s
        self._latency_s = latency_s
        self._on_drained = on_drained
        self._free_at_s = 0.0
        self._urgent: deque[_Waiting] = deque()
        self._others: deque[_Waiting] = deque()
        self._crossing: deque[tuple[float, _Waiting]] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_s = 0.0

    def carry(self, size_bytes: int, arrive: Callable[[], None], *, urgent: bool = False) -> None:
        """Let a message cross; `arrive` is called when it has."""
        now_s = asyncio.get_running_loop().time()
        (self._urgent if urgent else self._others).append(_Waiting(now_s, size_bytes, arrive))
        self.waiting_bytes += size_bytes
        self._move(now_s)

    def _tick(self) -> None:
        self._timer = None
        now_s = asyncio.get_running_loop().time()
        was_full = self.waiting_bytes > SOFT_BYTES
        self._move(now_s)
        while self._crossing and self._crossing[0][0] <= now_s:
            _, message = self._crossing.popleft()
            self.waiting_bytes -= message.size_bytes
            message.arrive()
        self._set_timer()
        if was_full and self.waiting_bytes <= SOFT_BYTES:
            self._on_drained()

    def _move(self, now_s: float) -> None:
        """Put onto the link what it is free for."""
        while self._free_at_s <= now_s + GRAIN_S and (waiting := self._urgent or self._others):
            message = waiting.popleft()
            begins_s = max(self._free_at_s, message.since_s)
            self._free_at_s = begins_s + message.size_bytes / self._bandwidth_bytes_per_s
            self._crossing.append((self._free_at_s + self._latency_s, message))
        self._set_timer()

    def _set_timer(self) -> None:
        if not self._crossing:
            return
        next_s = self._crossing[0][0]
        if self._urgent or self._others:
            next_s = min(next_s, self._free_at_s)
        if self._timer is not None:
            if self._timer_s <= next_s:
                return
            self._timer.cancel()
        self._timer, self._timer_s = asyncio.get_running_loop().call_at(next_s, self._tick), next_s


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

    def outward(self, node: NodeId | None, size_bytes: int, send: Callable[[], None], *, urgent: bool = False) -> None:
        """See `Shaping`. What has no link in the file goes as the socket lets it: the plan does not use it."""
        lane = self._out.get(node or COORDINATOR)
        if lane is None:
            send()
        else:
            lane.carry(size_bytes, send, urgent=urgent)

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
