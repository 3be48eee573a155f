import copy
import json
import tomllib
from typing import Any

import pytest

from helixd.layers import LayerRange
from helixd.plan.cluster.clusterfile import ClusterFileError, parse_cluster
from tests.unit.plan_worlds import shared_clusters

TOML = """
format = "helixd-cluster/1"
name = "two"
links = [["coordinator", "a", 1e6, 0.001], ["a", "b", 1e6, 0.001], ["b", "coordinator", 0, 0.001]]
[model]
name = "m"
num_layers = 4
layer_bytes = 1e6
activation_bytes = 100
token_bytes = 4
[node_types.T]
memory_bytes = 4e6
max_layers = 2
throughput_tokens_per_s = [10, 5]
kv_capacity_token_layers = [100, 50]
[[nodes]]
id = "a"
type = "T"
region = "r"
fixed_range = [0, 2]
[[nodes]]
id = "b"
type = "T"
max_layers = 1
exclude = true
"""


def data() -> dict[str, Any]:
    return tomllib.loads(TOML)


def test_toml_and_json_give_the_same_cluster() -> None:
    spec = parse_cluster(data())
    assert spec == parse_cluster(json.loads(json.dumps(data())))
    a, b = spec.nodes
    assert (a.id, a.region, a.fixed_range, a.profile.throughput_tokens_per_s) == ("a", "r", LayerRange(0, 2), (10, 5))
    assert (b.max_layers, b.exclude, b.nic_in_bytes_per_s) == (1, True, None)
    assert spec.links[2].bandwidth_bytes_per_s == 0
    assert spec.coordinator_nic_in_bytes_per_s is None
    assert spec.workload.fleet == {"T": 2}


@pytest.mark.parametrize(
    ("path", "value", "key"),
    [
        (("format",), "helixd-cluster/9", "format"),
        (("model", "num_layers"), 0, "model.num_layers"),
        (("model", "num_layers"), 4.5, "model.num_layers"),
        (("model", "num_layers"), 10**9 + 1, "model.num_layers"),
        (("model", "layer_bytes"), 1e308, "model.layer_bytes"),
        (("model", "layer_bytes"), 10**400, "model.layer_bytes"),
        (("model", "layer_bytes"), float("inf"), "model.layer_bytes"),
        (("model", "layer_bytes"), 0, "model.layer_bytes"),
        (("model", "layer_bytes"), float("nan"), "model.layer_bytes"),
        (("model", "activation_bytes"), "much", "model.activation_bytes"),
        (("model",), [], "model"),
        (("nodes",), [], "nodes"),
        (("nodes", 1, "type"), "X", "nodes[1].type"),
        (("nodes", 1, "id"), "a", "nodes[1].id"),
        (("nodes", 0, "id"), "coordinator", "nodes[0].id"),
        (("nodes", 0, "fixed_range"), [0, 5], "nodes[0].fixed_range"),
        (("nodes", 0, "fixed_range"), [2, 2], "nodes[0].fixed_range"),
        (("nodes", 0, "exclude"), "yes", "nodes[0].exclude"),
        (("nodes", 0, "nic_in_bytes_per_s"), -1, "nodes[0].nic_in_bytes_per_s"),
        (("node_types", "T", "throughput_tokens_per_s"), [10], "node_types.T.throughput_tokens_per_s"),
        (("node_types", "T", "kv_capacity_token_layers"), [1, "x"], "node_types.T.kv_capacity_token_layers[1]"),
        (("node_types", "T", "prompt_layer_time_s"), [[2, 1], [1, 1]], "node_types.T.prompt_layer_time_s[1]"),
        (("links", 0), ["coordinator", "a", 1e6], "links[0]"),
        (("links", 1), ["a", "c", 1e6, 0.1], "links[1]"),
        (("links", 1), ["a", "a", 1e6, 0.1], "links[1]"),
        (("links", 1), ["coordinator", "a", 1, 0.1], "links[1]"),
        (("workload",), {"mean_input_tokens": 0}, "workload.mean_input_tokens"),
    ],
)
def test_a_bad_value_is_refused_by_the_name_of_its_key(path: tuple[Any, ...], value: object, key: str) -> None:
    bad = copy.deepcopy(data())
    place: Any = bad
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    with pytest.raises(ClusterFileError) as caught:
        parse_cluster(bad)
    assert caught.value.key == key
    assert str(caught.value).startswith(f"{key}: ")


@pytest.mark.parametrize("name", ["format", "model", "nodes", "links", "node_types"])
def test_a_missing_key_is_named(name: str) -> None:
    bad = data()
    del bad[name]
    with pytest.raises(ClusterFileError, match=f"^{name}: is missing"):
        parse_cluster(bad)


def test_throughput_that_is_absent_needs_layer_times() -> None:
    bad = data()
    del bad["node_types"]["T"]["throughput_tokens_per_s"]
    with pytest.raises(ClusterFileError) as caught:
        parse_cluster(bad)
    assert caught.value.key == "node_types.T.prompt_layer_time_s"
    bad["node_types"]["T"]["prompt_layer_time_s"] = [[1, 0.01], [100, 0.1]]
    bad["node_types"]["T"]["decode_layer_time_s"] = [[1, 0.01], [100, 0.1]]
    curve = parse_cluster(bad).nodes[0].profile.throughput_tokens_per_s
    assert len(curve) == 2
    assert curve[0] > curve[1] > 0


def test_every_published_cluster_is_read() -> None:
    paths = sorted(shared_clusters().glob("*.json"))
    assert paths
    for path in paths:
        raw = json.loads(path.read_text())
        spec = parse_cluster(raw)
        assert (len(spec.nodes), len(spec.links)) == (len(raw["nodes"]), len(raw["links"]))
        assert spec.nodes[0].profile.batch_limits[0].prompt_max_tokens
