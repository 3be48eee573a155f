"""Emulated workers under a real coordinator: on the wire like any other, slow as their file says, without torch."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from helixd.emulation.hollow import write_hollow_checkpoint
from helixd.plan.cluster.clusterfile import parse_cluster
from tests.daemons import Daemons, completion, daemons

LAYERS = 6
LATENCY_S = 0.01
BANDWIDTH = 1e6
DECODE_S = 0.005
NODES = {"fast": "big", "slow1": "small", "slow2": "small"}
SCALE = 2.0


def cluster_file(path: Path) -> Path:
    """A fast node for all layers but not enough of it, two slow ones for half of them; one pair is not connected."""

    def kind(layers: int, speed: float) -> dict[str, object]:
        return {
            "memory_bytes": 100_000_000,
            "max_layers": layers,
            "kv_capacity_token_layers": [20_000.0 - 1000 * j for j in range(layers)],
            "prompt_layer_time_s": [[0, 0.0], [1, 0.0002 / speed], [1000, 0.1 / speed]],
            "decode_layer_time_s": [[0, 0.0], [2, DECODE_S / speed], [64, 2 * DECODE_S / speed]],
        }

    ends = ["coordinator", *NODES]
    file = {
        "format": "helixd-cluster/1",
        "name": "emulated",
        "model": {"num_layers": LAYERS, "activation_bytes": 128, "token_bytes": 4, "layer_bytes": 1_000_000},
        "node_types": {"big": kind(6, 2.0), "small": kind(3, 1.0)},
        "nodes": [{"id": name, "type": kind} for name, kind in NODES.items()],
        "links": [[a, b, BANDWIDTH, LATENCY_S] for a in ends for b in ends if a != b and (a, b) != ("slow2", "slow1")],
    }
    path.write_text(json.dumps(file))
    return path


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemons]:
    home = tmp_path_factory.mktemp("emulated")
    file = cluster_file(home / "cluster.json")
    spec = parse_cluster(json.loads(file.read_text()))
    hollow = write_hollow_checkpoint(home / "m", spec)
    memory = {node.id: hollow.memory_bytes(node.profile) for node in spec.nodes}
    pins = {"fast": (0, 3), "slow1": (3, 6), "slow2": (3, 6)}
    with daemons(home) as made:
        config = home / "cluster.toml"
        config.write_text(
            "[planner]\nwait_for_nodes = 3\n"
            + "".join(f'[planner.pins."{name}"]\nrange = {list(pin)}\n' for name, pin in pins.items())
        )
        made.coordinator(home / "m", "--config", str(config))
        for name, kind in NODES.items():
            made.start(
                name, "--role", "worker", "--coordinator", made.peers, "--device", f"emulated:{kind}",
                "--cluster-file", str(file), "--time-scale", str(SCALE), "--memory", str(memory[name]),
                "--set", f"node.id={name}",
            )  # fmt: skip
        made.wait_ready()
        yield made
        print(made.tails())


def test_links_are_those_of_the_file(rehearsal: Daemons) -> None:
    rehearsal.wait(lambda: len(rehearsal.get("/cluster")["links"]) >= 9, "all links to be known")
    links = {(link["src"], link["dst"]): link for link in rehearsal.get("/cluster")["links"]}
    assert links["slow2", "slow1"]["error"] == "no such link in the cluster file"
    for pair, link in links.items():
        if pair != ("slow2", "slow1"):
            assert link["error"] in ("", None), pair
            assert link["bandwidth_bytes_per_s"] == pytest.approx(BANDWIDTH / SCALE)
            assert link["rtt_s"] == pytest.approx(2 * LATENCY_S * SCALE)


def test_a_stream_takes_at_least_the_time_of_the_file(rehearsal: Daemons) -> None:
    new = 12
    began = time.monotonic()
    stream = completion(rehearsal, [65] * 20, new).read()
    took = time.monotonic() - began
    assert stream.done
    assert stream.text == "".join(chr(97 + position % 26) for position in range(20, 20 + new))
    per_token = 3 * DECODE_S / 2 + 3 * DECODE_S + 3 * LATENCY_S
    assert took >= new * per_token * SCALE
    rehearsal.wait_idle()


def test_work_is_shared_and_everything_is_given_back(rehearsal: Daemons) -> None:
    streams = [completion(rehearsal, [65] * (5 + number), 8) for number in range(12)]
    for stream in streams:
        assert stream.read().done
        assert len(stream.text) == 8
    routes = {stream.route for stream in streams}
    assert len(routes) == 2, routes
    rehearsal.wait_idle()


def test_emulated_workers_and_their_coordinator_have_no_torch(rehearsal: Daemons) -> None:
    for daemon in rehearsal.all.values():
        assert "libtorch" not in Path(f"/proc/{daemon.process.pid}/maps").read_text(), daemon.name
