"""Small clusters for the planner's and the router's tests."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from helixd.ids import NodeId
from helixd.layers import LayerRange
from helixd.plan.cluster.spec import COORDINATOR, ClusterSpec, LinkSpec, ModelSpec, NodeProfile, NodeSpec, WorkloadSpec

SHARED = Path(__file__).resolve().parents[3] / "shared" / "clusters"


def shared_clusters() -> Path:
    """The folder of published clusters; skips the test where it is not laid out."""
    if not SHARED.is_dir():
        pytest.skip("the published clusters are not beside the project")
    return SHARED


def node(
    name: str,
    throughput: Sequence[float],
    *,
    max_layers: int | None = None,
    kv: Sequence[float] | None = None,
    memory_bytes: float = 1e9,
) -> NodeSpec:
    layers = len(throughput) if max_layers is None else max_layers
    room = tuple(kv) if kv is not None else tuple(10_000.0 for _ in throughput)
    profile = NodeProfile("t", memory_bytes, layers, tuple(throughput), room)
    return NodeSpec(NodeId(name), profile)


def equal_nodes(count: int, max_layers: int, power: float = 1200.0) -> tuple[NodeSpec, ...]:
    """Nodes with T(j) = power / j."""
    curve = [power / j for j in range(1, max_layers + 1)]
    return tuple(node(f"n{i}", curve) for i in range(count))


def full_mesh(nodes: Iterable[NodeSpec], bandwidth: float = 1e9, latency_s: float = 1e-3) -> tuple[LinkSpec, ...]:
    ends = [*(n.id for n in nodes), COORDINATOR]
    return tuple(LinkSpec(a, b, bandwidth, latency_s) for a in ends for b in ends if a != b)


def cluster(
    nodes: Sequence[NodeSpec],
    num_layers: int,
    links: tuple[LinkSpec, ...] | None = None,
    *,
    embedding_bytes: float = 0.0,
    head_bytes: float = 0.0,
    min_kv_tokens: float = 0.0,
) -> ClusterSpec:
    model = ModelSpec("m", num_layers, 1e6, 1000.0, 4.0, embedding_bytes, head_bytes)
    workload = WorkloadSpec(min_kv_tokens=min_kv_tokens)
    return ClusterSpec("test", model, tuple(nodes), full_mesh(nodes) if links is None else links, workload)


def without_links(spec: ClusterSpec, gone: Iterable[tuple[str, str]]) -> ClusterSpec:
    dropped = set(gone)
    return replace(spec, links=tuple(link for link in spec.links if (link.src, link.dst) not in dropped))


def ranges(placement: Mapping[str, tuple[int, int]]) -> dict[NodeId, LayerRange]:
    return {NodeId(name): LayerRange(*pair) for name, pair in placement.items()}
