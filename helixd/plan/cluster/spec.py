"""What the planner is given: a model's sizes, nodes with their speed and KV room, links, a workload.

Facts only: frozen, no I/O, no defaults for things that were not measured (None = unknown). Links are directed; a
missing pair is no connection. `COORDINATOR` is source and sink of every flow.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from helixd.ids import NodeId
from helixd.layers import LayerRange

COORDINATOR = NodeId("coordinator")


@dataclass(frozen=True, slots=True)
class LayerWork:
    """What one layer asks of a device, for estimates (see `helixd.plan.cluster.roofline`).

    `kv_bytes_per_token`: K and V of one token. Of a mixture of experts, `expert_bytes` of the layer are experts, of
    which a token uses `expert_share`.
    """

    kv_bytes_per_token: float
    flops_per_token: float
    dtype: str
    expert_bytes: float = 0.0
    expert_share: float = 1.0


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Sizes of the model. `activation_bytes` is one token's hidden state, `token_bytes` one token id on the wire.

    `embedding_bytes` must also fit on a node that holds layer 0, `head_bytes` on one that holds the last layer.
    `work` is needed only for nodes whose speed is estimated.
    """

    name: str
    num_layers: int
    layer_bytes: float
    activation_bytes: float
    token_bytes: float
    embedding_bytes: float = 0.0
    head_bytes: float = 0.0
    work: LayerWork | None = None


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """The most one batch of a layer may hold (policy `paper` of the simulator; None: no limit)."""

    prompt_max_requests: float | None = None
    prompt_max_tokens: float | None = None
    decode_max_tokens: float | None = None
    decode_max_context: float | None = None


@dataclass(frozen=True, slots=True)
class NodeProfile:
    """What one kind of node can do; index j-1 is "holding j layers".

    `throughput_tokens_per_s[j-1]` is T(j), prompt and decode tokens together, under the workload.
    `kv_capacity_token_layers[j-1]` is the KV room left when j layers are held, in tokens x layers.
    Layer times are `(tokens in the batch, seconds for one layer)` points, linear between them; a decode batch
    counts sequences. `max_layers` is how many fit at all (0: none).
    """

    type: str
    memory_bytes: float
    max_layers: int
    throughput_tokens_per_s: tuple[float, ...]
    kv_capacity_token_layers: tuple[float, ...]
    prompt_layer_time_s: tuple[tuple[float, float], ...] = ()
    decode_layer_time_s: tuple[tuple[float, float], ...] = ()
    batch_limits: tuple[BatchLimits, ...] = ()
    estimated: bool = False


@dataclass(frozen=True, slots=True)
class NodeSpec:
    """One node. Constraints the user gave, and what it holds now, are honoured or reported, never dropped."""

    id: NodeId
    profile: NodeProfile
    region: str = ""
    nic_in_bytes_per_s: float | None = None
    nic_out_bytes_per_s: float | None = None
    min_layers: int | None = None
    max_layers: int | None = None
    exclude: bool = False
    fixed_range: LayerRange | None = None
    current_range: LayerRange | None = None


@dataclass(frozen=True, slots=True)
class LinkSpec:
    """A directed link. `bandwidth_bytes_per_s` of 0 carries nothing."""

    src: NodeId
    dst: NodeId
    bandwidth_bytes_per_s: float
    latency_s: float


@dataclass(frozen=True, slots=True)
class WorkloadSpec:
    """Mean request lengths and what the paper's derivation of T(j) needs (see `helixd.plan.cluster.profile`).

    `min_kv_tokens`: KV room that every node must keep for each layer it holds, in tokens.
    """

    mean_input_tokens: float = 750.0
    mean_output_tokens: float = 240.0
    kv_fraction: float = 0.3
    min_kv_tokens: float = 0.0
    typical_layers: Mapping[str, int] = field(default_factory=dict)
    fleet: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ClusterSpec:
    """The directed graph with capacities that everything is planned on."""

    name: str
    model: ModelSpec
    nodes: tuple[NodeSpec, ...]
    links: tuple[LinkSpec, ...]
    workload: WorkloadSpec = WorkloadSpec()
    coordinator_nic_in_bytes_per_s: float | None = None
    coordinator_nic_out_bytes_per_s: float | None = None

    def node(self, node_id: NodeId) -> NodeSpec:
        """The node of that id. Raises KeyError."""
        for node in self.nodes:
            if node.id == node_id:
                return node
        raise KeyError(node_id)
