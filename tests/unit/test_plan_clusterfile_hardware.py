"""Cluster files that name hardware, links by default, headroom; and for another model than their own."""

import tomllib
from pathlib import Path
from typing import Any

import pytest

from helixd.plan.cluster import clusterfile
from helixd.plan.cluster.clusterfile import FORMAT, ClusterFileError, parse_cluster, unknown_keys
from helixd.plan.cluster.spec import ClusterSpec, LayerWork, ModelSpec

HOME: dict[str, Any] = {
    "format": FORMAT,
    "model": {
        "num_layers": 8, "layer_bytes": 1e9, "activation_bytes": 8192, "token_bytes": 4,
        "kv_bytes_per_token_layer": 4096,
    },
    "nodes": [
        {"id": "a", "hardware": "rtx 4090"},
        {"id": "b", "type": "mac", "hardware": "M2 Max", "memory_bytes": 24e9},
        {"id": "c", "hardware": "RTX 4090"},
    ],
    "default_link": {"bandwidth_bytes_per_s": 1e8, "latency_s": 0.001},
}  # fmt: skip


def home(**changed: object) -> ClusterSpec:
    return parse_cluster({**HOME, **changed})


def test_hardware_by_name_is_an_estimate_and_equal_hardware_one_type() -> None:
    a, b, c = home().nodes
    assert a.profile is c.profile
    assert (a.profile.type, b.profile.type) == ("RTX 4090", "mac 24 GB")
    for node in (a, b):
        assert node.profile.estimated
        assert 0 < node.profile.max_layers <= 8
        assert len(node.profile.throughput_tokens_per_s) == node.profile.max_layers
        assert all(rate > 0 for rate in node.profile.throughput_tokens_per_s)
    # 85 % of 24 GB beside one layer, in tokens of 4096 bytes.
    assert a.profile.kv_capacity_token_layers[0] == pytest.approx((24e9 * 0.85 - 1e9) / 4096)


def test_layer_times_that_were_measured_replace_the_estimate() -> None:
    measured = {"hardware": "L4", "memory_bytes": 2e10, "max_layers": 2, "kv_capacity_token_layers": [3e5, 2e5]}
    measured |= {"prompt_layer_time_s": [[1, 0.001], [512, 0.1]], "decode_layer_time_s": [[1, 0.001], [64, 0.01]]}
    nodes = [{"id": "a", "type": "x"}, {"id": "b", "hardware": "L4"}]
    a, b = home(nodes=nodes, node_types={"x": measured}).nodes
    assert (a.profile.estimated, b.profile.estimated) == (False, True)
    assert a.profile.prompt_layer_time_s == ((1, 0.001), (512, 0.1))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"nodes": [{"id": "a", "hardware": "RTX 9999"}]}, r"nodes\[0\].hardware: 'RTX 9999' is not in the table"),
        ({"nodes": [{"id": "a", "hardware": "M2 Max"}]}, r"nodes\[0\].memory_bytes: is missing: M2 Max is sold"),
        ({"nodes": [{"id": "a"}]}, r"nodes\[0\].type: is missing; name a type of node_types, or hardware"),
        ({"model": {**HOME["model"], "dtype": "int8"}}, r"model.dtype: 'int8' is none of float32"),
        ({"default_link": {"latency_s": 1}}, r"default_link.bandwidth_bytes_per_s: is missing"),
        ({"node_types": {"x": {"hardware": "M1"}}}, r"node_types.x.memory_bytes: is missing"),
    ],
)
def test_what_is_wrong_with_named_hardware(changed: dict[str, object], said: str) -> None:
    with pytest.raises(ClusterFileError, match=f"^{said}"):
        home(**changed)


def test_an_estimate_needs_the_kv_of_a_token() -> None:
    model = {key: value for key, value in HOME["model"].items() if key != "kv_bytes_per_token_layer"}
    with pytest.raises(ClusterFileError, match=r"can be estimated only if model\.kv_bytes_per_token_layer is given"):
        home(model=model)


def test_a_default_link_is_every_pair_that_is_not_named() -> None:
    spec = home(links=[["a", "b", 5e6, 0.1], ["b", "a", 0, 0]])
    links = {(link.src, link.dst): link.bandwidth_bytes_per_s for link in spec.links}
    assert len(links) == 4 * 3
    assert (links["a", "b"], links["b", "a"], links["a", "c"], links["coordinator", "c"]) == (5e6, 0, 1e8, 1e8)
    without = {key: value for key, value in HOME.items() if key != "default_link"}
    with pytest.raises(ClusterFileError, match=r"^links: is missing"):
        parse_cluster(without)


def test_headroom_is_memory_that_is_not_there() -> None:
    nodes = [{"id": "a", "hardware": "RTX 4090"}, {"id": "b", "hardware": "RTX 4090", "memory_headroom_bytes": 4e9}]
    full, less = (node.profile for node in home(nodes=nodes).nodes)
    assert less.kv_capacity_token_layers[0] == pytest.approx(full.kv_capacity_token_layers[0] - 4e9 / 4096)
    assert less.memory_bytes == full.memory_bytes - 4e9
    (none,) = home(nodes=[{"id": "a", "hardware": "RTX 4090", "memory_headroom_bytes": 30e9}]).nodes
    assert (none.profile.max_layers, none.profile.throughput_tokens_per_s) == (0, ())


def test_another_model_scales_what_was_measured_and_keeps_nothing_else() -> None:
    measured = {
        "memory_bytes": 2e10, "max_layers": 2, "kv_capacity_token_layers": [3e5, 2e5],
        "throughput_tokens_per_s": [9e9, 9e9],
        "prompt_layer_time_s": [[1, 0.001], [512, 0.1]], "decode_layer_time_s": [[1, 0.001], [64, 0.01]],
    }  # fmt: skip
    data = {**HOME, "nodes": [{"id": "a", "type": "x"}], "node_types": {"x": measured}}
    half = ModelSpec("half", 4, 0.5e9, 4096, 4, work=LayerWork(1024, 0.25e9, "bfloat16"))
    spec = parse_cluster(data, model=half)
    profile = spec.nodes[0].profile
    assert spec.model is half
    assert profile.estimated
    # A quarter of the sums, half of the bytes.
    assert profile.prompt_layer_time_s == ((1, 0.00025), (512, 0.025))
    assert profile.decode_layer_time_s == ((1, 0.0005), (64, 0.005))
    assert profile.max_layers == 4
    assert profile.throughput_tokens_per_s[0] < 9e9
    no_times = {key: value for key, value in measured.items() if not key.endswith("time_s")}
    with pytest.raises(ClusterFileError, match=r"^node_types.x.prompt_layer_time_s: is missing, or hardware"):
        parse_cluster({**data, "node_types": {"x": no_times}}, model=half)


def test_toml_says_the_same_as_json() -> None:
    text = """
        format = "helixd-cluster/1"
        model = { num_layers = 8, layer_bytes = 1e9, activation_bytes = 8192, token_bytes = 4, \
kv_bytes_per_token_layer = 4096 }
        nodes = [{ id = "a", hardware = "rtx 4090" },
                 { id = "b", type = "mac", hardware = "M2 Max", memory_bytes = 24e9 }]
        [default_link]
        bandwidth_bytes_per_s = 1e8
        latency_s = 1e-3
    """
    assert parse_cluster(tomllib.loads(text)) == home(nodes=HOME["nodes"][:2])


def test_unknown_keys_are_named_with_what_was_meant() -> None:
    data = {**HOME, "nodes": [{"id": "a", "hardware": "L4", "max_layer": 3}], "zzz": 1, "workload": {"fleet": {}}}
    assert unknown_keys(data) == [("zzz", None), ("nodes[0].max_layer", "max_layers")]


def test_the_documentation_has_every_key() -> None:
    text = (Path(__file__).parents[2] / "docs" / "planning.md").read_text(encoding="utf-8")
    for keys in clusterfile._KNOWN.values():
        for key in keys:
            if key not in ("batch_limits",):
                assert f"`{key}" in text or f" {key}" in text, key


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1, 10**400, True, "1"])
def test_numbers_that_are_none(value: object) -> None:
    with pytest.raises(ClusterFileError, match=r"^default_link.latency_s: must be"):
        home(default_link={"bandwidth_bytes_per_s": 1, "latency_s": value})
