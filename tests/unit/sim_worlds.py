"""Small timed clusters and loads for the simulator's tests."""

from collections.abc import Sequence
from dataclasses import replace

from helixd.ids import NodeId
from helixd.layers import LayerRange
from helixd.plan.cluster.spec import BatchLimits, ClusterSpec, NodeSpec, WorkloadSpec
from helixd.plan.graph.flow import FlowModel
from helixd.plan.graph.schedule import schedule_of
from helixd.plan.plan import Plan
from helixd.sim.load import Lengths
from tests.unit.plan_worlds import cluster, full_mesh, node, ranges

PROMPT_S = ((0.0, 0.0), (1000.0, 0.1))
DECODE_S = ((0.0, 0.0), (2.0, 0.002), (100.0, 0.004))
SHORT = Lengths([(40, 8), (100, 20), (10, 30)])


def timed(name: str, *, kv: float = 4_000.0, speed: float = 1.0, layers: int = 4, prompts: int | None = 2) -> NodeSpec:
    """A node for up to `layers` layers with room for `kv` token-layers."""
    plain = node(name, [1000.0 * speed / j for j in range(1, layers + 1)], kv=[kv] * layers)
    limits = (BatchLimits(prompt_max_requests=prompts, prompt_max_tokens=512),) * layers
    profile = replace(
        plain.profile,
        prompt_layer_time_s=tuple((x, y / speed) for x, y in PROMPT_S),
        decode_layer_time_s=tuple((x, y / speed) for x, y in DECODE_S),
        batch_limits=limits,
    )
    return replace(plain, profile=profile)


def world(nodes: Sequence[NodeSpec], num_layers: int = 4, *, latency_s: float = 0.001) -> ClusterSpec:
    spec = cluster(list(nodes), num_layers, full_mesh(nodes, bandwidth=1e8, latency_s=latency_s))
    return replace(spec, workload=WorkloadSpec(mean_input_tokens=50.0, mean_output_tokens=19.0))


def placed(spec: ClusterSpec, placement: dict[str, tuple[int, int]]) -> Plan:
    held: dict[NodeId, LayerRange] = ranges(placement)
    flow = FlowModel(spec).solve(held)
    return Plan(spec.model.num_layers, held, schedule_of(flow), flow.value)


def four_nodes(*, kv: float = 4_000.0) -> tuple[ClusterSpec, Plan]:
    """Two stages of two nodes; one node of the second stage also takes sequences in its middle."""
    spec = world([timed(name, kv=kv) for name in "abcd"])
    return spec, placed(spec, {"a": (0, 2), "b": (0, 3), "c": (2, 4), "d": (3, 4)})
