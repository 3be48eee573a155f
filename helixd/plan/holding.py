"""What each node may hold: memory, embedding and head on the ends, pins. And what KV room is left then.

Knows nothing of links or of the other nodes' ranges.
"""

from collections.abc import Mapping
from functools import cached_property

from helixd.ids import NodeId
from helixd.layers import LayerRange
from helixd.plan.cluster.spec import ClusterSpec, LinkSpec, NodeSpec
from helixd.plan.plan import Infeasible

_GIB = 2.0**30


class Holding:
    """The ranges that are allowed for each node of a cluster.

    Raises Infeasible where a pin asks of a node what it cannot hold.
    """

    def __init__(self, spec: ClusterSpec) -> None:
        self.spec = spec
        self.num_layers = spec.model.num_layers
        self._nodes = {node.id: node for node in spec.nodes}
        self._most = {
            node.id: {(first, last): self._max_layers(node, first, last) for first in (0, 1) for last in (0, 1)}
            for node in spec.nodes
        }
        self._options: dict[tuple[object, ...], tuple[LayerRange, ...]] = {}
        for node in spec.nodes:
            self._check_pins(node)

    @cached_property
    def links(self) -> Mapping[tuple[NodeId, NodeId], LinkSpec]:
        """The cluster's links by their ends."""
        return {(link.src, link.dst): link for link in self.spec.links}

    def node(self, node: NodeId) -> NodeSpec:
        """The node of that id. Raises KeyError."""
        return self._nodes[node]

    def usable(self) -> tuple[NodeSpec, ...]:
        """Nodes that may hold anything at all."""
        return tuple(node for node in self.spec.nodes if not node.exclude and self._most[node.id][0, 0] > 0)

    def max_layers(self, node: NodeId, *, first: bool = False, last: bool = False) -> int:
        """The most layers `node` may hold, if among them are the first and the last of the model. 0: not at all."""
        return self._most[node][int(first), int(last)]

    def min_layers(self, node: NodeId) -> int:
        """The fewest layers `node` may hold if it holds any (1 unless pinned)."""
        return max(1, self._nodes[node].min_layers or 1)

    def must_hold(self, node: NodeId) -> bool:
        """Whether a pin says that `node` has to hold something."""
        spec = self._nodes[node]
        return not spec.exclude and (spec.fixed_range is not None or bool(spec.min_layers))

    def allows(self, node: NodeId, held: LayerRange) -> bool:
        """Whether `node` may hold exactly that range."""
        fixed = self._nodes[node].fixed_range
        if fixed is not None:
            return not self._nodes[node].exclude and held == fixed
        most = self.max_layers(node, first=held.start == 0, last=held.end == self.num_layers)
        return held.end <= self.num_layers and self.min_layers(node) <= len(held) <= most

    def allows_all(self, placement: Mapping[NodeId, LayerRange]) -> bool:
        """Whether every range is allowed and every node that has to hold something does."""
        return all(self.allows(node, held) for node, held in placement.items()) and all(
            node.id in placement for node in self.spec.nodes if self.must_hold(node.id)
        )

    def options(self, node: NodeId) -> tuple[LayerRange, ...]:
        """Every range that `node` may hold, shorter first; without "nothing". Like nodes get the same tuple."""
        spec = self._nodes[node]
        if spec.fixed_range is not None:
            return () if spec.exclude else (spec.fixed_range,)
        key = (self.min_layers(node), tuple(self._most[node].values()))
        found = self._options.get(key)
        if found is None:
            most, num_layers = self._most[node], self.num_layers
            found = self._options[key] = tuple(
                LayerRange(start, start + length)
                for length in range(self.min_layers(node), self.max_layers(node) + 1)
                for start in range(num_layers - length + 1)
                if length <= most[start == 0, start + length == num_layers]
            )
        return found

    def kv_token_layers(self, node: NodeId, held: LayerRange) -> float:
        """KV room of `node` in tokens x layers while it holds `held`; negative if even the weights do not fit."""
        return _kv_room(self.spec, self._nodes[node], len(held), self._extra_bytes(held))

    def kv_capacity(self, placement: Mapping[NodeId, LayerRange]) -> dict[NodeId, float]:
        """KV room of every node of a placement."""
        return {node: self.kv_token_layers(node, held) for node, held in placement.items()}

    def check_memory(self) -> None:
        """Raises Infeasible, in GiB, if the nodes cannot hold the model however the layers are cut."""
        model = self.spec.model
        nodes = self.usable()
        layers = sum(self.max_layers(node.id) for node in nodes)
        needed = model.num_layers * model.layer_bytes + model.embedding_bytes + model.head_bytes
        if layers < model.num_layers:
            offered = layers * model.layer_bytes
            raise Infeasible(
                f"model {model.name} needs {_gib(needed)} GiB for weights, nodes offer {_gib(offered)} GiB "
                f"({layers} of {model.num_layers} layers on {len(nodes)} usable nodes): "
                "add nodes or memory, or serve a smaller model"
            )
        for place, size, first, last in (
            ("layer 0 and the embedding", model.embedding_bytes, True, False),
            (f"layer {model.num_layers - 1} and the head", model.head_bytes, False, True),
        ):
            only = model.num_layers == 1
            if not any(self.max_layers(node.id, first=first or only, last=last or only) for node in nodes):
                raise Infeasible(
                    f"no node can hold {place} together ({_gib(model.layer_bytes + size)} GiB and KV room): "
                    "give one node more memory"
                )

    def _extra_bytes(self, held: LayerRange) -> float:
        model = self.spec.model
        return (model.embedding_bytes if held.start == 0 else 0.0) + (
            model.head_bytes if held.end == self.num_layers else 0.0
        )

    def _max_layers(self, node: NodeSpec, first: int, last: int) -> int:
        model, profile = self.spec.model, node.profile
        extra = first * model.embedding_bytes + last * model.head_bytes
        most = min(
            profile.max_layers,
            self.num_layers,
            len(profile.throughput_tokens_per_s),
            len(profile.kv_capacity_token_layers),
            node.max_layers if node.max_layers is not None else self.num_layers,
        )
        least_kv = self.spec.workload.min_kv_tokens
        while most > 0:
            if extra == 0 and least_kv == 0:
                return most
            room = _kv_room(self.spec, node, most, extra)
            fits = most * model.layer_bytes + extra <= profile.memory_bytes
            if fits and room > 0 and room >= least_kv * most:
                return most
            most -= 1
        return 0

    def _check_pins(self, node: NodeSpec) -> None:
        if node.exclude:
            return
        if node.fixed_range is not None:
            held = node.fixed_range
            most = self.max_layers(node.id, first=held.start == 0, last=held.end == self.num_layers)
            if held.end > self.num_layers or len(held) > most or len(held) < self.min_layers(node.id):
                raise Infeasible(
                    f"node {node.id} is pinned to {held} ({len(held)} layers) but may hold {most} there: "
                    "change its fixed_range or give it memory"
                )
        elif node.min_layers and node.min_layers > self.max_layers(node.id):
            raise Infeasible(
                f"node {node.id} is pinned to at least {node.min_layers} layers but may hold "
                f"{self.max_layers(node.id)}: lower min_layers or give it memory"
            )


def _kv_room(spec: ClusterSpec, node: NodeSpec, layers: int, extra_bytes: float) -> float:
    """KV room beside `layers` layers and `extra_bytes` of embedding or head.

    A profile says what a layer's weights cost in KV room by how its room shrinks from one layer count to the next;
    other weights cost as much per byte.
    """
    room = node.profile.kv_capacity_token_layers
    if extra_bytes <= 0:
        return room[layers - 1]
    if len(room) < 2:
        # One point shows no slope: the whole memory beside the layer is KV room.
        free = node.profile.memory_bytes - layers * spec.model.layer_bytes
        return room[layers - 1] * (1 - extra_bytes / free) if free > 0 else -1.0
    at = min(layers, len(room) - 1)
    per_layer = max(0.0, room[at - 1] - room[at])
    return room[layers - 1] - per_layer * extra_bytes / spec.model.layer_bytes


def _gib(size_bytes: float) -> str:
    gib = size_bytes / _GIB
    return f"{gib:.1f}" if gib >= 0.95 else f"{gib:.3g}"
