"""From what is known of the fleet to a plan: the ClusterSpec, and a run of the planner's process (`helixd.solver`).

Nothing unmeasured is planned with: a node without measurements and a link without a probe are absent.
"""

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from helixd import logs
from helixd.coordinator.fleet import Fleet, Node
from helixd.coordinator.relay import Pair, relayed_fact
from helixd.ids import NodeId, PeerId
from helixd.layers import LayerRange
from helixd.model.decoder import DTYPE_BYTES, DecoderConfig, DType
from helixd.model.sizes import embedding_bytes, head_bytes, layer_bytes
from helixd.plan.cluster.profile import NodeMeasurement, profiles_from_measurements
from helixd.plan.cluster.spec import COORDINATOR, ClusterSpec, LinkSpec, ModelSpec, NodeSpec, WorkloadSpec
from helixd.plan.plan import Plan
from helixd.solver.job import Job, Reload
from helixd.solver.process import solve

log = logging.getLogger(__name__)

TOKEN_BYTES = 4
IN_PROCESS_BYTES_PER_S = 10e9
# Planning never takes the processor from serving.
NICE = 5


@dataclass(frozen=True, slots=True)
class Pin:
    """What the operator says about one node."""

    min_layers: int | None = None
    max_layers: int | None = None
    range: LayerRange | None = None
    exclude: bool = False


@dataclass(frozen=True, slots=True)
class PlanningOptions:
    """`kv_fraction`: share of a node's memory that layers leave free for KV, given up if nothing fits otherwise.

    `workload.min_kv_tokens` of KV room in every held layer are never given up. `pins` by node id. What nodes hold is
    moved only if that pays within `horizon_s` for loading at `load_bytes_per_s`. `simulate`: while nothing is held,
    take the plan that simulates best instead of the one predicted best.
    """

    time_limit_s: float = 10.0
    workload: WorkloadSpec = field(default_factory=WorkloadSpec)
    kv_fraction: float = 0.3
    pins: Mapping[str, Pin] = field(default_factory=dict)
    load_bytes_per_s: float = 500 * 2**20
    horizon_s: float = 3600.0
    simulate: bool = False


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """Bytes of the model's parts in the dtype it is computed in."""

    layer_bytes: int
    embedding_bytes: int
    head_bytes: int
    activation_bytes: int
    kv_bytes_per_token_layer: int
    num_layers: int

    @classmethod
    def of(cls, config: DecoderConfig, dtype: DType) -> "ModelSizes":
        """Sizes of a decoder; layers of unequal size count as the largest."""
        return cls(
            layer_bytes=max(layer_bytes(config, dtype)),
            embedding_bytes=embedding_bytes(config, dtype),
            head_bytes=head_bytes(config, dtype),
            activation_bytes=config.hidden_size * DTYPE_BYTES[dtype],
            kv_bytes_per_token_layer=2 * config.num_kv_heads * config.head_dim * DTYPE_BYTES[dtype],
            num_layers=config.num_layers,
        )

    def weights_of(self, layers: Collection[int]) -> int:
        """Bytes of what a node holds for these layers, embedding and head included at the model's ends."""
        embedding = self.embedding_bytes if 0 in layers else 0
        head = self.head_bytes if self.num_layers - 1 in layers else 0
        return len(layers) * self.layer_bytes + embedding + head


def build_spec(
    fleet: Fleet, name: str, sizes: ModelSizes, options: PlanningOptions, holding: Mapping[NodeId, LayerRange],
    relayed: Collection[Pair] = (),
) -> ClusterSpec:  # fmt: skip
    """The cluster as it is measured now, at work where that differs much.

    `holding`: the ranges nodes have loaded, which a new plan may keep.

    `relayed`: workers that nothing connects, taken to be connected through the coordinator.
    """
    nodes = [node for node in fleet.ready_nodes() if node.measured is not None]
    model = ModelSpec(
        name, sizes.num_layers, sizes.layer_bytes, sizes.activation_bytes, TOKEN_BYTES,
        sizes.embedding_bytes, sizes.head_bytes,
    )  # fmt: skip
    measured = {node.id: _measurement(node) for node in nodes}
    profiles = profiles_from_measurements(measured, model, sizes.kv_bytes_per_token_layer, options.workload)
    specs = []
    for node in nodes:
        pin = options.pins.get(node.id, Pin())
        roomy = int(node.hardware.memory_budget_bytes * (1 - options.kv_fraction) // sizes.layer_bytes)
        specs.append(
            NodeSpec(
                node.id, profiles[node.id], min_layers=pin.min_layers,
                max_layers=pin.max_layers if pin.max_layers is not None else max(1, roomy),
                exclude=pin.exclude, fixed_range=pin.range, current_range=holding.get(node.id),
            )
        )  # fmt: skip
    return ClusterSpec(name, model, tuple(specs), tuple(_links(fleet, nodes, relayed)), options.workload)


def _measurement(node: Node) -> NodeMeasurement:
    assert node.measured is not None
    return NodeMeasurement(
        node.hardware.device_name or node.hardware.device,
        node.hardware.memory_budget_bytes,
        tuple((rows, seconds * node.slowdown.prefill) for rows, seconds in node.measured.prompt_layer_time_s),
        tuple((rows, seconds * node.slowdown.decode) for rows, seconds in node.measured.decode_layer_time_s),
    )


def _links(fleet: Fleet, nodes: list[Node], relayed: Collection[Pair]) -> list[LinkSpec]:
    links = []
    for a in nodes:
        for src, dst in ((COORDINATOR, a.id), (a.id, COORDINATOR)):
            fact = fleet.links.get((PeerId(COORDINATOR), a.peer))
            if fact is not None and not fact.error:
                links.append(LinkSpec(src, dst, fact.bandwidth_bytes_per_s, fact.rtt_s / 2))
        for b in nodes:
            if a.id == b.id:
                continue
            if a.peer == b.peer:
                links.append(LinkSpec(a.id, b.id, IN_PROCESS_BYTES_PER_S, 0.0))
                continue
            fact = fleet.links.get((a.peer, b.peer))
            if frozenset((a.peer, b.peer)) in relayed:
                fact = relayed_fact(fleet, a.peer, b.peer)
            if fact is not None and not fact.error:
                links.append(LinkSpec(a.id, b.id, fact.bandwidth_bytes_per_s, fact.rtt_s / 2))
    return links


async def run_planner(
    spec: ClusterSpec, options: PlanningOptions, in_force: Mapping[NodeId, LayerRange] | None = None
) -> tuple[Plan, Plan | None]:
    """Plan in a child process. A search that broke off gives the best plan it had.

    The second plan is the placement `in_force` as it is worth on this cluster; None if no pipeline is left of it.
    Raises Infeasible, or PlannerFailed (crash, time, memory, nonsense, and nothing found before).
    """
    held = None if in_force is None else dict(in_force)
    reload = Reload(options.load_bytes_per_s, options.horizon_s)
    job = Job(
        spec, time_limit_s=options.time_limit_s, simulate=options.simulate, in_force=held, reload=reload, nice=NICE
    )  # fmt: skip
    outcome = await solve(job)
    assert outcome.plan is not None
    if outcome.cut_off is not None:
        logs.event(log, logging.WARNING, "planner_cut_off", reason=outcome.cut_off, method=outcome.plan.method)
    return outcome.plan, outcome.in_force
