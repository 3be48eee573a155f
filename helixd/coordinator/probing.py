"""Measuring the links: which pairs still need a probe, one probe at a time per host, bounded bytes.

Workers probe each other over the sockets that carry activations; the coordinator only asks and waits. A pair that
cannot connect is recorded with its error: the planner treats it as absent, and it is asked again, ever less often,
until it can. Where one of the two can connect, the other one is asked again at once, and plans are told who dials. Runs
again for whoever joins.
"""

import asyncio
import logging
from collections.abc import Callable

from helixd import logs
from helixd.coordinator.fleet import Fleet, LinkFact, Peer
from helixd.ids import PeerId
from helixd.plan.cluster.spec import COORDINATOR
from helixd.protocol.codec import to_frame
from helixd.protocol.messages import Probe, Probed
from helixd.wire.link import Link

log = logging.getLogger(__name__)

RETRY_S = 10.0
RETRY_MAX_S = 60.0
NOTABLE = 1.5
ALIKE_RTT_S = 0.005
"""Round trips below this are alike: so much passes in event loops."""
HUB = PeerId(COORDINATOR)
Pair = tuple[PeerId, PeerId]


class Prober:
    """Keeps the fleet's link facts complete. `changed` is called whenever a fact was added."""

    def __init__(
        self, fleet: Fleet, me: PeerId, tasks: asyncio.TaskGroup, changed: Callable[[], None],
        max_bytes: int, timeout_s: float,
    ) -> None:  # fmt: skip
        self._fleet = fleet
        self._me = me
        self._tasks = tasks
        self._changed = changed
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._busy_hosts: set[str] = set()
        self._under_way: dict[Pair, asyncio.Future[LinkFact]] = {}
        self._retry_s: dict[Pair, float] = {}
        self._retries: dict[Pair, asyncio.Task[None]] = {}
        self._due: dict[Pair, None] = {}
        self._wanted: dict[Pair, None] = {}

    @property
    def complete(self) -> bool:
        """Whether every pair has a fact."""
        return not self._missing()

    def pump(self) -> None:
        """Start the probes that can start now; what was never measured goes ahead of what failed."""
        self._due = {pair: None for pair in self._due if (known := self._fleet.links.get(pair)) and known.error}
        self._wanted = {
            pair: None for pair in self._wanted if (known := self._fleet.links.get(pair)) and not known.error
        }
        for src, dst in [*self._missing(), *self._due, *self._wanted]:
            if (src, dst) in self._under_way:
                continue
            hosts = {self._host(src), self._host(dst)}
            if hosts & self._busy_hosts:
                continue
            self._due.pop((src, dst), None)
            self._wanted.pop((src, dst), None)
            self._busy_hosts |= hosts
            self._under_way[src, dst] = asyncio.get_running_loop().create_future()
            self._tasks.create_task(self._probe(src, dst, hosts), name=f"probe {src} -> {dst}")

    def on_probed(self, src: PeerId, message: Probed) -> None:
        """A worker's answer."""
        to_me = message.peer == self._me
        waiting = self._under_way.get((HUB, src) if to_me else (src, PeerId(message.peer)))
        if waiting is not None and not waiting.done():
            waiting.set_result(LinkFact(message.rtt_s, message.bandwidth_bytes_per_s, message.error))

    def again(self, pair: Pair) -> None:
        """Measure a link that works once more, when its turn comes."""
        self._wanted[pair] = None
        self.pump()

    def link_lost(self, a: PeerId, b: PeerId, reason: str) -> None:
        """A data link broke: both ways are unusable until a later probe says otherwise."""
        for pair in ((a, b), (b, a)):
            self._fleet.links[pair] = LinkFact(0.0, 0.0, reason)
            self._ask_again(pair)
        self._changed()

    def on_peer_lost(self, peer: PeerId) -> None:
        """Nobody answers for a peer that is gone; its next life is asked at once."""
        self._retry_s = {pair: patience for pair, patience in self._retry_s.items() if peer not in pair}
        for pair, waiting in self._under_way.items():
            if peer in pair and not waiting.done():
                waiting.set_result(LinkFact(0.0, 0.0, f"{peer} left"))

    def _ask_again(self, pair: Pair) -> None:
        if pair in self._retries:
            return
        delay_s = self._retry_s.get(pair, RETRY_S)
        self._retry_s[pair] = min(2 * delay_s, RETRY_MAX_S)

        async def later() -> None:
            await asyncio.sleep(delay_s)
            del self._retries[pair]
            self._due[pair] = None
            self.pump()

        self._retries[pair] = self._tasks.create_task(later(), name=f"probe {pair[0]} -> {pair[1]} again")

    async def _probe(self, src: PeerId, dst: PeerId, hosts: set[str]) -> None:
        asked = self._lives(src, dst)
        try:
            fact = await self._ask(src, dst)
        finally:
            del self._under_way[src, dst]
            self._busy_hosts -= hosts
        # What was found of a life that is over says nothing of the next one.
        if asked is not None and asked == self._lives(src, dst):
            before = self._fleet.links.get((src, dst))
            if before is not None and not before.error and fact.error:
                fact = before  # a link that carries work is not given up because a probe of it failed
            self._fleet.links[src, dst] = fact
            if fact.error:
                if before is None:
                    logs.event(log, logging.WARNING, "link_unusable", src=src, dst=dst, reason=fact.error)
                self._ask_again((src, dst))
            else:
                self._retry_s.pop((src, dst), None)
                self._measure_back(src, dst)
            if before is None or bool(before.error) != bool(fact.error) or _differs(before, fact):
                self._changed()
        self.pump()

    def _measure_back(self, src: PeerId, dst: PeerId) -> None:
        """There is a link now, which carries both ways: who could not make it can measure it, while it is there."""
        back = self._fleet.links.get((dst, src))
        if back is not None and back.error:
            self._fleet.cannot_dial.add((dst, src))
            del self._fleet.links[dst, src]

    def _lives(self, src: PeerId, dst: PeerId) -> tuple[Link | None, Link] | None:
        """The links of both peers' present lives; None if one is gone. The coordinator is always the same."""
        one, other = self._fleet.peers.get(src), self._fleet.peers.get(dst)
        if other is None or (one is None and src != HUB):
            return None
        return (None if one is None else one.link), other.link

    async def _ask(self, src: PeerId, dst: PeerId) -> LinkFact:
        asked = self._fleet.peers.get(dst if src == HUB else src)
        other = self._fleet.peers.get(dst)
        if asked is None:
            return LinkFact(0.0, 0.0, "left")
        if src == HUB:
            # Tokens are a few bytes each: the worker measures its way to us, and both ways are taken to be alike.
            request = Probe(self._me, "", 0, self._max_bytes)
        elif other is not None:
            request = Probe(dst, other.host, other.port, self._max_bytes)
        else:
            return LinkFact(0.0, 0.0, "left")
        waiting = self._under_way[src, dst]
        asked.outbox.post(to_frame(request))
        try:
            async with asyncio.timeout(self._timeout_s):
                return await waiting
        except TimeoutError:
            return LinkFact(0.0, 0.0, f"{asked.id} did not answer a probe within {self._timeout_s:g} s")

    def _missing(self) -> list[tuple[PeerId, PeerId]]:
        peers = [peer for peer in self._fleet.peers.values() if self._measured(peer)]
        pairs = [(HUB, peer.id) for peer in peers]
        pairs += [(a.id, b.id) for a in peers for b in peers if a.id != b.id]
        return [pair for pair in pairs if pair not in self._fleet.links]

    def _measured(self, peer: Peer) -> bool:
        """Probing while a device is being measured would spoil both."""
        return all(self._fleet.nodes[node].measured is not None for node in peer.nodes)

    def _host(self, peer: PeerId) -> str:
        return "" if peer == HUB else self._fleet.peers[peer].host


def _differs(before: LinkFact, after: LinkFact) -> bool:
    """Whether a link that was measured again is not what it was."""
    rates = sorted((before.bandwidth_bytes_per_s, after.bandwidth_bytes_per_s))
    times = sorted(max(ALIKE_RTT_S, fact.rtt_s) for fact in (before, after))
    return rates[1] > NOTABLE * rates[0] or times[1] > NOTABLE * times[0]
