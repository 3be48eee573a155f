"""Who is in the cluster and what is known of them: the one owner of membership facts.

A node's facts are what it said and what was measured; nothing is invented where nothing was measured. Knows no plan.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from helixd.ids import Incarnation, NodeId, PeerId
from helixd.protocol.messages import Hello, Measured, NodeHardware, NodeStatus
from helixd.wire.link import Link
from helixd.wire.outbox import Outbox

ABOUT = 0.75
LEAST_SAID = 0.25
"""Of a wait in vain, what a node's oldest work must be about as old as, and what it must have said itself at least:
nodes say how they are once a second."""


@dataclass(slots=True)
class Peer:
    """A worker daemon that has been welcomed. `parcels`: pieces of weights wait there, and nothing else behind them."""

    id: PeerId
    incarnation: Incarnation
    link: Link
    outbox: Outbox
    host: str
    port: int
    hello: Hello
    draining: bool = False
    nodes: list[NodeId] = field(default_factory=list)
    parcels: Outbox = field(init=False)

    def __post_init__(self) -> None:
        self.parcels = Outbox(self.link, lambda: None)


class Slowdown(NamedTuple):
    """How many times longer than measured a node's layers are taken to take."""

    prefill: float = 1.0
    decode: float = 1.0


AS_MEASURED = Slowdown()


@dataclass(slots=True)
class Node:
    """A device of a peer. `problem`: why it could not load lately; `failures`: how often it could not.

    `heard_s`: when `status` came. `hangs_after_steps`: how many steps it had done when it was seen to hang, None if it
    does not. `slowdown` is what is planned with.
    """

    id: NodeId
    peer: PeerId
    hardware: NodeHardware
    measured: Measured | None = None
    status: NodeStatus | None = None
    problem: str = ""
    failures: int = 0
    heard_s: float = 0.0
    hangs_after_steps: int | None = None
    slowdown: Slowdown = AS_MEASURED


@dataclass(frozen=True, slots=True)
class LinkFact:
    """What is known of the path from one peer to another. `error`: why it cannot be used, "" if it can."""

    rtt_s: float
    bandwidth_bytes_per_s: float
    error: str = ""


class Fleet:
    """Peers, nodes and links between peers, as they are now.

    `cannot_dial`: (one, other) where a link can be made by the other one only, as if that is behind NAT. Remembered
    over their lives, since a new life is on the same network.
    """

    def __init__(self) -> None:
        self.peers: dict[PeerId, Peer] = {}
        self.nodes: dict[NodeId, Node] = {}
        self.links: dict[tuple[PeerId, PeerId], LinkFact] = {}
        self.cannot_dial: set[tuple[PeerId, PeerId]] = set()

    def add(self, peer: Peer) -> list[str]:
        """Welcome a peer. Returns what is wrong: names of its nodes that another peer already has."""
        taken = [
            hardware.node
            for hardware in peer.hello.nodes
            if (known := self.nodes.get(NodeId(hardware.node))) is not None and known.peer != peer.id
        ]
        if taken:
            return taken
        self.peers[peer.id] = peer
        for hardware in peer.hello.nodes:
            node = Node(NodeId(hardware.node), peer.id, hardware)
            self.nodes[node.id] = node
            peer.nodes.append(node.id)
        return []

    def remove(self, peer_id: PeerId, link: Link) -> Peer | None:
        """The peer's link closed: forget it, its nodes, its links. None if a newer link has taken its place."""
        peer = self.peers.get(peer_id)
        if peer is None or peer.link is not link:
            return None
        del self.peers[peer_id]
        for node in peer.nodes:
            self.nodes.pop(node, None)
        self.links = {pair: fact for pair, fact in self.links.items() if peer_id not in pair}
        return peer

    def peer_of(self, node: NodeId) -> Peer | None:
        """The peer that has `node`."""
        known = self.nodes.get(node)
        return None if known is None else self.peers.get(known.peer)

    def ready_nodes(self) -> Iterator[Node]:
        """Nodes that are measured, not about to leave, and did not fail to load lately."""
        for node in self.nodes.values():
            peer = self.peers.get(node.peer)
            if node.measured is not None and peer is not None and not peer.draining and not node.problem:
                yield node

    def unusable_nodes(self) -> frozenset[NodeId]:
        """Nodes of draining peers, and nodes that hang: nothing new goes there."""
        return frozenset(
            node.id
            for node in self.nodes.values()
            if node.hangs_after_steps is not None or self.peers[node.peer].draining
        )

    def suspect(self, nodes: Iterable[NodeId], waited_s: float, now_s: float) -> list[NodeId]:
        """A sequence waited for so long in vain: those of its `nodes` that hang, as far as is not known yet.

        One hangs if about as long ago as that it took up work that it has not done since. Its loop may be well: it says
        so itself.
        """
        found = []
        for name in nodes:
            node = self.nodes.get(name)
            if node is None or node.status is None or node.hangs_after_steps is not None:
                continue
            said_s = node.status.oldest_work_age_s
            if said_s >= LEAST_SAID * waited_s and said_s + now_s - node.heard_s >= ABOUT * waited_s:
                node.hangs_after_steps = node.status.steps_done
                found.append(node.id)
        return found

    def heard(self, status: NodeStatus, now_s: float) -> bool:
        """A node says how it is. True if it hung, and works again."""
        node = self.nodes[NodeId(status.node)]
        node.status, node.heard_s = status, now_s
        works = status.steps_done != node.hangs_after_steps or not status.oldest_work_age_s
        if node.hangs_after_steps is None or not works:
            return False
        node.hangs_after_steps = None
        return True

    def unusable_links(self) -> frozenset[tuple[NodeId, NodeId]]:
        """Node pairs whose peers are known not to reach each other."""
        return frozenset(
            (a, b)
            for (src, dst), fact in self.links.items()
            if fact.error and src in self.peers and dst in self.peers
            for a in self.peers[src].nodes
            for b in self.peers[dst].nodes
        )
