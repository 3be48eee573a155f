"""Where a worker's messages leave it: one outbox per peer, a direct hand-over between nodes of the same daemon.

Knows which peer hosts which node and whom the coordinator relays to (epochs tell it), and which link leads there; knows
nothing of what it carries.
"""

import asyncio
from collections.abc import Callable, Iterable

from helixd.ids import NodeId, PeerId
from helixd.protocol.codec import to_frame
from helixd.protocol.messages import Activations, Message, PathSeen
from helixd.wire.link import Frame, Link
from helixd.wire.outbox import Outbox
from helixd.worker.shaping import Shaping

# What a message without rows counts for on a shaped link.
TOKEN_BYTES = 4
MOST_PATHS = 256

LocalDelivery = Callable[[NodeId, Activations, memoryview], None]


class PostOffice:
    """The outboxes of one worker. Its tasks live in the TaskGroup it is given."""

    def __init__(
        self, me: PeerId, tasks: asyncio.TaskGroup, deliver_here: LocalDelivery, wake: Callable[[], None],
        shaping: Shaping | None = None,
    ) -> None:  # fmt: skip
        self._me = me
        self._tasks = tasks
        self._deliver_here = deliver_here
        self._wake = wake
        self._shaping = shaping
        self._boxes: dict[PeerId, Outbox] = {}
        self._senders: dict[Link, asyncio.Task[None]] = {}
        self._hosts: dict[NodeId, PeerId] = {}
        self._coordinator: PeerId | None = None
        # Rows that the coordinator passes on wait for others than it; its own messages do not wait for them.
        self._relay: Outbox | None = None
        self._relay_sender: asyncio.Task[None] | None = None
        self._relayed: set[PeerId] = set()
        self._relayed_until_linked: set[PeerId] = set()

    def set_coordinator(self, peer: PeerId | None) -> None:
        """Whom `to_coordinator` reaches from now on; it relays to nobody before it says so."""
        self._coordinator = peer
        self._relay = None
        if self._relay_sender is not None:
            self._relay_sender.cancel()
            self._relay_sender = None
        self._relayed.clear()
        self._relayed_until_linked.clear()

    def relay(self, peer: PeerId, through_coordinator: bool) -> None:
        """Whether what is for `peer` goes to the coordinator from now on; if not, as soon as there is a link to it."""
        if through_coordinator:
            self._relayed.add(peer)
            self._open_relay()
        elif peer in self._relayed:
            self._relayed.discard(peer)
            if peer not in self._boxes:
                self._relayed_until_linked.add(peer)

    def learn_hosts(self, hosts: Iterable[tuple[NodeId, PeerId]]) -> None:
        """Which peer hosts which node; a node never moves within its life, later words win."""
        self._hosts.update(hosts)

    def add_link(self, link: Link) -> None:
        """Start sending over a new link; it takes the place of an older one to the same peer."""
        box = Outbox(link, self._wake)
        self._boxes[link.peer] = box
        self._relayed_until_linked.discard(link.peer)
        self._senders[link] = self._tasks.create_task(box.run(), name=f"send to {link.peer}")

    def drop_link(self, link: Link) -> None:
        """The link closed."""
        sender = self._senders.pop(link, None)
        if sender is not None:
            sender.cancel()
        box = self._boxes.get(link.peer)
        if box is not None and box.link is link:
            del self._boxes[link.peer]

    def reaches(self, node: NodeId) -> bool:
        """Whether rows for `node` could be sent now."""
        peer = self._hosts.get(node)
        return peer == self._me or self._box(peer)[0] is not None

    def to_coordinator(self, message: Message) -> None:
        """Queue a message for the coordinator; dropped when there is none."""
        box = self._boxes.get(self._coordinator) if self._coordinator is not None else None
        if box is not None:
            self._send(None, box, to_frame(message), TOKEN_BYTES)

    def to_node(self, node: NodeId, message: Activations, payload: memoryview, *, urgent: bool) -> bool:
        """Queue activations for another node, ahead of what is not urgent; False if there is no link to its peer."""
        peer = self._hosts.get(node)
        if peer == self._me:
            self._deliver_here(node, message, payload)
            return True
        box, relayed = self._box(peer)
        if box is None:
            return False
        self._send(None if relayed else node, box, to_frame(message, payload), payload.nbytes, urgent)
        return True

    def paths(self) -> list[PathSeen]:
        """What the links to other daemons are like at work; a shaped one says nothing of what it stands for."""
        if self._shaping is not None:
            return []
        found = (
            PathSeen(peer, box.link.rtt_s or 0.0, box.goodput_bytes_per_s() or 0.0)
            for peer, box in sorted(self._boxes.items())
        )
        return [path for path in found if path.rtt_s or path.goodput_bytes_per_s][:MOST_PATHS]

    def congested(self, node: NodeId) -> bool:
        """Whether prefill rows for that node should wait."""
        box, relayed = self._box(self._hosts.get(node))
        if self._shaping is not None and self._shaping.congested(None if relayed else node):
            return True
        return box is not None and box.congested

    def _box(self, peer: PeerId | None) -> tuple[Outbox | None, bool]:
        """Where what is for `peer` is posted, and whether the coordinator passes it on."""
        relayed = peer in self._relayed or peer in self._relayed_until_linked
        if relayed:
            return self._relay, True
        return (None if peer is None else self._boxes.get(peer)), False

    def _open_relay(self) -> None:
        box = None if self._coordinator is None else self._boxes.get(self._coordinator)
        if box is not None and self._relay is None:
            self._relay = Outbox(box.link, self._wake)
            self._relay_sender = self._tasks.create_task(self._relay.run(), name=f"relay by {self._coordinator}")

    def _send(self, node: NodeId | None, box: Outbox, frame: Frame, size_bytes: int, urgent: bool = False) -> None:
        if self._shaping is None:
            box.post(frame, urgent=urgent)
        else:
            self._shaping.outward(node, size_bytes, lambda: box.post(frame, urgent=urgent), urgent=urgent)
