"""Plans in force: push one, wait until its nodes are ready, switch to it, retire what came before.

A plan's epoch only rises. Workers load beside what they serve; where memory does not allow both, everything stops for
the switch (its sequences wait, they are not lost). Sequences of an older epoch run on where their hops are unchanged;
the others are told to move. A plan that lost so much while it was loaded that it cannot serve takes the place of none
that can. Knows nothing of how a plan is made.
"""

import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field

from msgspec.structs import replace

from helixd import logs
from helixd.coordinator.admission import Admission
from helixd.coordinator.fleet import Fleet
from helixd.coordinator.planning import ModelSizes
from helixd.coordinator.relay import Pair, node_links
from helixd.coordinator.sequence import Lease
from helixd.ids import Epoch, NodeId, PeerId
from helixd.layers import LayerRange
from helixd.plan.cluster.spec import COORDINATOR
from helixd.plan.plan import Plan
from helixd.protocol.codec import to_frame
from helixd.protocol.messages import Assignment, EpochPush, EpochRetire, EpochState, PeerAddress
from helixd.route.router import Router

log = logging.getLogger(__name__)

LEAST_KV_TOKENS = 128
"""A node with less KV room per held layer than this cannot serve while it switches."""


@dataclass(slots=True)
class PlanInForce:
    """An epoch's plan and how far its nodes are. `states` by node: loading, ready or failed.

    `relayed`: workers whose rows for one another go through the coordinator.
    """

    epoch: Epoch
    plan: Plan
    kv_token_layers: dict[NodeId, int]
    states: dict[NodeId, EpochState] = field(default_factory=dict)
    relayed: frozenset[Pair] = frozenset()

    def ready(self, node: NodeId) -> bool:
        """Whether a node serves this epoch."""
        state = self.states.get(node)
        return state is not None and state.state == "ready"


class Epochs:
    """The one owner of the active and the coming plan."""

    def __init__(
        self, fleet: Fleet, admission: Admission, sizes: ModelSizes, first: Epoch, remember: Callable[[Epoch], None]
    ) -> None:
        self.active: PlanInForce | None = None
        self.coming: PlanInForce | None = None
        self._fleet = fleet
        self._admission = admission
        self._sizes = sizes
        self._last = first
        self._remember = remember
        self._retired_below = first
        self._relayed: dict[Epoch, frozenset[Pair]] = {}
        # Also of plans that were overtaken or given up: until they are retired, workers may hold their layers.
        self._alive: dict[Epoch, Plan] = {}

    def holding(self) -> dict[NodeId, LayerRange]:
        """What nodes hold or are loading, as far as it is a single range."""
        held: dict[NodeId, LayerRange] = {}
        for peer in self._fleet.peers.values():
            for node, start, end in peer.hello.held:
                if node in peer.nodes and 0 <= start < end <= self._sizes.num_layers:
                    held[NodeId(node)] = LayerRange(start, end)
        for plan in (self.active, self.coming):
            if plan is not None:
                held.update((n, r) for n, r in plan.plan.placement.items() if n in self._fleet.nodes)
        return held

    def push(self, plan: Plan, relayed: frozenset[Pair] = frozenset()) -> None:
        """Start the switch to `plan`, whose rows between `relayed` workers go through the coordinator."""
        if self.active is None:
            # Plans that never served and never will: their layers make room first.
            self._retire_below(Epoch(self._last + 1))
        elif self._is_tight(plan):
            logs.event(
                log, logging.WARNING, "serving_pauses", epoch=self._last + 1,
                reason="old and new layers do not fit side by side",
            )  # fmt: skip
            self.active = None
            self._admission.use_plan(Epoch(self._last + 1), None)
            self._admission.break_where(lambda lease: True, "moved", "the plan changed")
            self._retire_below(Epoch(self._last + 1))
        self._begin(plan, relayed)

    def _begin(self, plan: Plan, relayed: frozenset[Pair]) -> None:
        self._last = Epoch(self._last + 1)
        self._remember(self._last)
        self.coming = PlanInForce(self._last, plan, self._rooms(plan, self._alive.values()), relayed=relayed)
        self._relayed[self._last] = relayed
        self._alive[self._last] = plan
        self._send(self.coming)
        placement = ", ".join(f"{node} {layers}" for node, layers in sorted(plan.placement.items()))
        logs.event(log, logging.INFO, "epoch_pushed", epoch=self._last, placement=placement)

    def _is_tight(self, plan: Plan) -> bool:
        """Whether a node could not serve with the layers of `plan` beside all that it may hold."""
        return any(
            node in self._fleet.nodes and room < len(plan.placement[node]) * LEAST_KV_TOKENS
            for node, room in self._rooms(plan, self._alive.values()).items()
        )

    def on_state(self, state: EpochState) -> None:
        """A node tells how far it is."""
        for plan in (self.active, self.coming):
            if plan is None or plan.epoch != state.epoch:
                continue
            # Told of its plan again (more KV room, a new neighbour), a node that serves goes on serving.
            if not (plan.ready(NodeId(state.node)) and state.state == "loading"):
                plan.states[NodeId(state.node)] = state
        if state.state == "failed":
            logs.event(log, logging.ERROR, "node_failed", node=state.node, epoch=state.epoch, reason=state.message)
        self._switch_if_ready()

    def on_node_lost(self, node: NodeId) -> None:
        """A node is gone: it confirms nothing any more."""
        for plan in (self.active, self.coming):
            if plan is not None:
                plan.states.pop(node, None)
        self._switch_if_ready()

    def welcome_back(self, nodes: Collection[NodeId]) -> None:
        """Nodes (re)joined and are measured: those of a plan in force are told of it again."""
        for plan, other in ((self.active, self.coming), (self.coming, self.active)):
            back = [] if plan is None else [node for node in nodes if node in plan.plan.placement]
            if plan is None or not back:
                continue
            # While it was away nothing could be said of its room.
            beside = () if other is None else (other.plan,)
            plan.kv_token_layers.update((node, self._room(plan.plan, node, beside)) for node in back)
            if plan is self.active:
                for node in back:
                    self._admission.ledger.set_capacity(node, plan.kv_token_layers[node])
            self._send(plan)

    def uses(self, node: NodeId) -> bool:
        """Whether a node holds layers of the active or the coming plan."""
        return any(plan is not None and node in plan.plan.placement for plan in (self.active, self.coming))

    def relays(self, one: PeerId, other: PeerId) -> bool:
        """Whether a plan that is alive relays between these workers."""
        return any(frozenset((one, other)) in pairs for pairs in self._relayed.values())

    def relayed_links(self) -> frozenset[tuple[NodeId, NodeId]]:
        """Node pairs whose rows the active plan sends through the coordinator."""
        return frozenset() if self.active is None else node_links(self._fleet, self.active.relayed)

    def unready_nodes(self) -> frozenset[NodeId]:
        """Nodes of the active plan that do not serve it."""
        if self.active is None:
            return frozenset()
        return self._unready_of(self.active)

    def retire_drained(self) -> None:
        """Retire old epochs once nothing runs in them."""
        if self.active is None or self._retired_below >= self.active.epoch:
            return
        if all(lease.epoch >= self.active.epoch for lease in self._admission.leases()):
            self._retire_below(self.active.epoch)
            beside = [plan for epoch, plan in self._alive.items() if epoch != self.active.epoch]
            self.active.kv_token_layers = self._rooms(self.active.plan, beside)
            self._send(self.active)

    def _switch_if_ready(self) -> None:
        coming = self.coming
        if coming is None:
            return
        outstanding = [
            node
            for node in coming.plan.placement
            if node in self._fleet.nodes and (coming.states.get(node) is None or coming.states[node].state == "loading")
        ]
        if outstanding:
            return
        if self.active is not None and not self._connects(coming) and self._admission.has_pipeline():
            self._give_up(coming, self.active)
            return
        self.active, self.coming = coming, None
        self._admission.use_plan(
            coming.epoch, Router(coming.plan, coming.kv_token_layers, ledger=self._admission.ledger)
        )  # fmt: skip
        moved = self._admission.break_where(
            lambda lease: lease.epoch < coming.epoch and not _still_held(lease, coming.plan.placement),
            "moved", "the plan changed",
        )  # fmt: skip
        logs.event(log, logging.INFO, "epoch_serves", epoch=coming.epoch, moved_sequences=moved)
        self.retire_drained()

    def _give_up(self, coming: PlanInForce, active: PlanInForce) -> None:
        """Stay with the plan that serves; what is wrong with the other one was heard of, and is planned around."""
        self.coming = None
        logs.event(
            log, logging.WARNING, "epoch_given_up", epoch=coming.epoch, serving=active.epoch,
            reason="what is left of it does not connect",
        )  # fmt: skip
        # What was loaded for it goes when a later epoch takes over: the plan that serves, under a new number.
        if coming.plan is not active.plan and not self._is_tight(active.plan):
            self._begin(active.plan, active.relayed)

    def _connects(self, plan: PlanInForce) -> bool:
        """Whether a pipeline is left of a plan, as far as its nodes are."""
        links = self._fleet.unusable_links() - node_links(self._fleet, plan.relayed)
        return Router(plan.plan, {}).has_pipeline(self._unready_of(plan) | self._fleet.unusable_nodes(), links)

    def _unready_of(self, plan: PlanInForce) -> frozenset[NodeId]:
        return frozenset(n for n in plan.plan.placement if n not in self._fleet.nodes or not plan.ready(n))

    def _retire_below(self, epoch: Epoch) -> None:
        self._retired_below = epoch
        self._relayed = {number: pairs for number, pairs in self._relayed.items() if number >= epoch}
        self._alive = {number: plan for number, plan in self._alive.items() if number >= epoch}
        for peer in self._fleet.peers.values():
            peer.outbox.post(to_frame(EpochRetire(epoch)))

    def _send(self, plan: PlanInForce) -> None:
        all_of_it = [self._assignment(plan, node, layers) for node, layers in plan.plan.placement.items()]
        # Others' schedules are none of a worker's business, and all of them together outgrow a message.
        without_hops = [replace(assignment, next_hops=[]) for assignment in all_of_it]
        for peer in self._fleet.peers.values():
            assignments = [
                full if full.peer == peer.id else short for full, short in zip(all_of_it, without_hops, strict=True)
            ]
            push = EpochPush(plan.epoch, assignments, self._neighbours(plan, peer.id))
            peer.outbox.post(to_frame(push))

    def _assignment(self, plan: PlanInForce, node: NodeId, layers: LayerRange) -> Assignment:
        peer = self._fleet.peer_of(node)
        hops = [
            ("" if hop.node == COORDINATOR else hop.node, hop.flow_tokens_per_s)
            for hop in plan.plan.schedule.get(node, ())
        ]
        host = peer.id if peer is not None else ""
        return Assignment(node, host, layers.start, layers.end, plan.kv_token_layers[node], hops)

    def _neighbours(self, plan: PlanInForce, me: PeerId) -> list[PeerAddress]:
        """Peers that this one sends to or receives from. The receiver dials, where it can, unless they are relayed."""
        found: dict[PeerId, PeerAddress] = {}
        for src, hops in plan.plan.schedule.items():
            for hop in hops:
                a, b = self._fleet.peer_of(src), self._fleet.peer_of(hop.node)
                if a is None or b is None or a.id == b.id or me not in (a.id, b.id):
                    continue
                other = a if me == b.id else b
                dialler = a if (b.id, a.id) in self._fleet.cannot_dial else b
                known = found.get(other.id)
                relay = frozenset((a.id, b.id)) in plan.relayed
                dial = not relay and (me == dialler.id or (known is not None and known.dial))
                found[other.id] = PeerAddress(other.id, other.host, other.port, dial, relay)
        return list(found.values())

    def _rooms(self, plan: Plan, beside: Collection[Plan]) -> dict[NodeId, int]:
        return {node: self._room(plan, node, beside) for node in plan.placement}

    def _room(self, plan: Plan, node: NodeId, beside: Iterable[Plan]) -> int:
        """KV token-layers left on a node that holds its layers of `plan`, and those of the plans it holds beside.

        0 for a node that is not here now.
        """
        known = self._fleet.nodes.get(node)
        if known is None:
            return 0
        held = set(plan.placement[node].layers())
        for other in beside:
            if (layers := other.placement.get(node)) is not None:
                held |= set(layers.layers())
        weights = self._sizes.weights_of(held)
        return max(0, (known.hardware.memory_budget_bytes - weights) // self._sizes.kv_bytes_per_token_layer)


def _still_held(lease: Lease, placement: Mapping[NodeId, LayerRange]) -> bool:
    """Whether every hop of a route is still on a node that holds its layers."""
    return all(
        (held := placement.get(hop.node)) is not None and held.start <= hop.layers.start and hop.layers.end <= held.end
        for hop in lease.route.hops
    )
