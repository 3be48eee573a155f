import json

import pytest

from helixd.ids import NodeId
from helixd.plan.cluster.clusterfile import parse_cluster
from helixd.plan.cluster.profile import (
    NodeMeasurement,
    TypeTimes,
    derive_throughput,
    layer_time_s,
    profiles_from_measurements,
)
from helixd.plan.cluster.spec import ModelSpec, WorkloadSpec
from tests.unit.plan_worlds import shared_clusters


def test_published_throughput_follows_from_published_layer_times() -> None:
    for path in sorted(shared_clusters().glob("*.json")):
        spec = parse_cluster(json.loads(path.read_text()))
        profiles = {node.profile.type: node.profile for node in spec.nodes}
        times = {
            name: TypeTimes(p.prompt_layer_time_s, p.decode_layer_time_s, p.kv_capacity_token_layers)
            for name, p in profiles.items()
        }
        derived = derive_throughput(times, spec.workload, spec.model.num_layers)
        for name, profile in profiles.items():
            assert derived[name] == pytest.approx(profile.throughput_tokens_per_s, rel=1e-13), (path.stem, name)


@pytest.mark.parametrize(("batch", "seconds"), [(0, 1), (1, 1), (1.5, 1.5), (2, 2), (4, 5), (8, 11)])
def test_layer_time_is_linear_between_points_and_goes_on_beyond_them(batch: float, seconds: float) -> None:
    assert layer_time_s([(1, 1), (2, 2), (4, 5)], batch) == pytest.approx(seconds)


def test_layer_time_without_points_is_an_error() -> None:
    with pytest.raises(ValueError, match="measured"):
        layer_time_s([], 1)


MODEL = ModelSpec("m", 12, layer_bytes=100.0, activation_bytes=10, token_bytes=4)
PROMPT = ((1.0, 0.001), (512.0, 0.05))
DECODE = ((1.0, 0.001), (32.0, 0.004))


def profile_of(memory_bytes: float, **workload: float) -> tuple[int, tuple[float, ...], tuple[float, ...]]:
    node = NodeId("a")
    measured = {node: NodeMeasurement("cpu", memory_bytes, PROMPT, DECODE)}
    found = profiles_from_measurements(measured, MODEL, 1.0, WorkloadSpec(**workload))[node]
    return found.max_layers, found.kv_capacity_token_layers, found.throughput_tokens_per_s


def test_memory_beside_the_weights_is_kv_room() -> None:
    layers, kv, throughput = profile_of(1000)
    # 10 layers would leave nothing for KV.
    assert layers == 9
    assert kv == (900, 800, 700, 600, 500, 400, 300, 200, 100)
    assert len(throughput) == 9
    assert all(rate > 0 for rate in throughput)


@pytest.mark.parametrize(("memory", "layers"), [(100, 0), (109, 0), (110, 1), (219, 1), (220, 2), (5000, 12)])
def test_most_layers_on_both_sides_of_the_limit(memory: float, layers: int) -> None:
    assert profile_of(memory, min_kv_tokens=10)[0] == layers


def test_a_node_that_holds_nothing_does_not_spoil_the_others() -> None:
    measured = {
        NodeId("tiny"): NodeMeasurement("cpu", 10, PROMPT, DECODE),
        NodeId("big"): NodeMeasurement("cpu", 1e6, PROMPT, DECODE),
    }
    profiles = profiles_from_measurements(measured, MODEL, 1.0, WorkloadSpec())
    assert profiles[NodeId("tiny")].max_layers == 0
    assert profiles[NodeId("big")].max_layers == 12


def test_more_kv_room_never_makes_a_node_slower() -> None:
    scarce = profile_of(1_500)[2][0]
    ample = profile_of(50_000_000)[2][0]
    assert ample > scarce > 0
