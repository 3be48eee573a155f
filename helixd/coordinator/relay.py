"""Rows between two workers that nothing connects, by way of the coordinator: which pairs, and the carrying.

The exception, not the rule: the coordinator's links and loop carry what workers should send one another. A pair is
relayed only while no plan works without, and says so in `/cluster`, the log, the figures and the plan's notes. Nothing
here is kept: small frames join what waits for their worker, large ones go one at a time per sender, which is held back
by credits for as long; a worker that takes nothing is closed by its link's own `send_deadline_s`, as ever.
"""

import logging
from collections.abc import Callable, Collection, Iterable

from helixd import logs
from helixd.coordinator.fleet import Fleet, LinkFact, Peer
from helixd.errors import PeerLost
from helixd.ids import NodeId, PeerId
from helixd.plan.cluster.spec import COORDINATOR
from helixd.plan.plan import Plan
from helixd.protocol.messages import Activations
from helixd.protocol.versions import RELAY_VERSION
from helixd.wire.errors import FrameError
from helixd.wire.link import Frame

log = logging.getLogger(__name__)

SMALL_BYTES = 64 << 10
"""Rows of decode steps: they never hold back the tokens that come behind them."""

Pair = frozenset[PeerId]
"""Two workers, either way."""


def relayable(fleet: Fleet) -> frozenset[Pair]:
    """Pairs of workers that know they cannot reach each other, and that both understand being relayed."""
    return frozenset(
        frozenset((a, b))
        for (a, b), there in fleet.links.items()
        if there.error and (back := fleet.links.get((b, a))) is not None and back.error and _able(fleet, (a, b))
    )


def relayed_fact(fleet: Fleet, src: PeerId, dst: PeerId) -> LinkFact | None:
    """What the way from `src` to `dst` through the coordinator is like; None if either end of it is not known."""
    up, down = _to_hub(fleet, src), _to_hub(fleet, dst)
    if up is None or down is None:
        return None
    return LinkFact(up.rtt_s + down.rtt_s, min(up.bandwidth_bytes_per_s, down.bandwidth_bytes_per_s))


def used_pairs(fleet: Fleet, plan: Plan, pairs: Collection[Pair]) -> frozenset[Pair]:
    """Those of `pairs` that `plan` sends rows over."""
    found = set()
    for src, hops in plan.schedule.items():
        for hop in hops:
            a, b = fleet.peer_of(src), fleet.peer_of(hop.node)
            if a is not None and b is not None and (pair := frozenset((a.id, b.id))) in pairs:
                found.add(pair)
    return frozenset(found)


def relay_notes(fleet: Fleet, plan: Plan, pairs: Collection[Pair]) -> dict[NodeId, str]:
    """A sentence on each node of `plan` whose rows go through the coordinator."""
    said: dict[NodeId, list[NodeId]] = {}
    ways = node_links(fleet, pairs)
    for src, hops in plan.schedule.items():
        for hop in hops:
            if (src, hop.node) in ways:
                said.setdefault(src, []).append(hop.node)
    return {
        node: f"relayed: its rows for {', '.join(sorted(others))} pass through the coordinator, nothing else links them"
        for node, others in said.items()
    }


def node_links(fleet: Fleet, pairs: Iterable[Pair]) -> frozenset[tuple[NodeId, NodeId]]:
    """All ways between the nodes of each pair."""
    return frozenset(
        (a, b)
        for one, other in map(sorted, pairs)
        for src, dst in ((one, other), (other, one))
        if src in fleet.peers and dst in fleet.peers
        for a in fleet.peers[src].nodes
        for b in fleet.peers[dst].nodes
    )


class Relay:
    """Carries rows for pairs that a live plan relays; counts what it carried and what it had to drop."""

    def __init__(self, fleet: Fleet, allowed: Callable[[PeerId, PeerId], bool]) -> None:
        self.carried_frames = 0
        self.carried_bytes = 0
        self.dropped_frames = 0
        self._fleet = fleet
        self._allowed = allowed

    async def carry(self, src: Peer, message: Activations, frame: Frame) -> None:
        """Pass rows on to the worker that has their node; waits while that one takes nothing.

        What cannot be passed on is dropped: its sequences move when the loss of their worker is heard of, or when
        their step takes too long.
        """
        dst = self._fleet.peer_of(NodeId(message.node))
        if dst is None or not self._allowed(src.id, dst.id):
            self.dropped_frames += 1
            logs.event(log, logging.INFO, "relay_dropped", src=src.id, node=message.node, reason="no plan relays this")
            return
        size_bytes = 0 if frame.payload is None else frame.payload.nbytes
        if size_bytes <= SMALL_BYTES:
            dst.outbox.post(frame)
        else:
            try:
                await dst.link.send(frame)
            except (PeerLost, FrameError) as error:
                self.dropped_frames += 1
                logs.event(log, logging.WARNING, "relay_dropped", src=src.id, node=message.node, reason=str(error))
                return
        self.carried_frames += 1
        self.carried_bytes += size_bytes


def _able(fleet: Fleet, pair: tuple[PeerId, PeerId]) -> bool:
    return all(
        (peer := fleet.peers.get(name)) is not None
        and peer.hello.protocol >= RELAY_VERSION
        and _to_hub(fleet, name) is not None
        for name in pair
    )


def _to_hub(fleet: Fleet, peer: PeerId) -> LinkFact | None:
    fact = fleet.links.get((PeerId(COORDINATOR), peer))
    return None if fact is None or fact.error else fact
