"""Who is in the cluster and what is known of them: the one owner of membership facts.

A node's facts are what it said and what was measured; nothing is invented where nothing was measured. Knows no plan.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from helixd.ids import Incarnation, NodeId, PeerId
from helixd.protocol.messages import Hello, Measured, NodeHardware, NodeStatus
from helixd.wire.link import Link
from helixd.wire.outbox import Outbox


@dataclass(slots=True)
class Peer:
    """A worker daemon that has been welcomed."""

    id: PeerId
    incarnation: Incarnation
    link: Link
    outbox: Outbox
    host: str
    port: int
    hello: Hello
    draining: bool = False
    nodes: list[NodeId] = field(default_factory=list)


class Slowdown(NamedTuple):
    """How many times longer than measured a node's layers are taken to take."""

    prefill: float = 1.0
    decode: float = 1.0


AS_MEASURED = Slowdown()


@dataclass(slots=True)
class Node:
    """A device of a peer. `problem`: why it could not load lately; `failures`: how often it could not.

    `slowdown` is what is planned with.
    """

    id: NodeId
    peer: PeerId
    hardware: NodeHardware
    measured: Measured | None = None
    status: NodeStatus | None = None
    problem: str = ""
    failures: int = 0
    slowdown: Slowdown = AS_MEASURED


@dataclass(frozen=True, slots=True)
class LinkFact:
    """What is known of the path from one peer to another. `error`: why it cannot be used, "" if it can."""

    rtt_s: float
    bandwidth_bytes_per_s: float
    error: str = ""


class Fleet:
    """Peers, nodes and links between peers, as they are now."""

    def __init__(self) -> None:
        self.peers: dict[PeerId, Peer] = {}
        self.nodes: dict[NodeId, Node] = {}
        self.links: dict[tuple[PeerId, PeerId], LinkFact] = {}

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
        """Nodes of draining peers: nothing new goes there."""
        return frozenset(n for peer in self.peers.values() if peer.draining for n in peer.nodes)

    def unusable_links(self) -> frozenset[tuple[NodeId, NodeId]]:
        """Node pairs whose peers are known not to reach each other."""
        return frozenset(
            (a, b)
            for (src, dst), fact in self.links.items()
            if fact.error and src in self.peers and dst in self.peers
            for a in self.peers[src].nodes
            for b in self.peers[dst].nodes
        )
