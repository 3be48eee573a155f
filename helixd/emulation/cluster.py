"""A worker's place in a cluster file: its profile, its links, as an emulated device. Blocking: reads the file."""

import json
import tomllib
from dataclasses import dataclass
from pathlib import Path

from helixd.emulation.backend import EmulatedBackend
from helixd.errors import ConfigError, HelixError
from helixd.ids import NodeId, PeerId
from helixd.plan.cluster.clusterfile import parse_cluster
from helixd.plan.cluster.spec import ClusterSpec
from helixd.worker.backend import NodeSetup

PREFIX = "emulated:"


@dataclass(frozen=True, slots=True)
class EmulatedDevice:
    """Everything an emulated worker needs: one node, what it does, the cluster it stands in."""

    setup: NodeSetup
    backend: EmulatedBackend
    cluster: ClusterSpec


def emulated_device(
    peer: PeerId, device: str, cluster_file: Path | None, memory: int | None, scale: float
) -> EmulatedDevice:
    """The device called `emulated:TYPE` of that file, in the place of the node whose id is `peer`.

    Memory for weights and KV is `memory`, or what the type's KV room at one layer and that layer come to. Raises
    ConfigError saying what is missing.
    """
    if cluster_file is None:
        raise ConfigError(f"device {device!r} needs the cluster file that describes it: --cluster-file FILE")
    spec = _read(cluster_file)
    kind = device.removeprefix(PREFIX)
    profiles = {node.profile.type: node.profile for node in spec.nodes}
    profile = profiles.get(kind)
    if profile is None:
        raise ConfigError(f"{cluster_file} has no node type {kind!r}; it has: {', '.join(sorted(profiles))}")
    if not profile.prompt_layer_time_s or not profile.decode_layer_time_s:
        raise ConfigError(f"{cluster_file}: type {kind!r} has no layer times to emulate")
    if all(node.id != NodeId(peer) for node in spec.nodes):
        raise ConfigError(f"{cluster_file} has no node {str(peer)!r}: name one with --set node.id=ID")
    budget = memory if memory is not None else int(profile.memory_bytes)
    setup = NodeSetup(NodeId(peer), device, kind, budget, budget)
    return EmulatedDevice(setup, EmulatedBackend(profile, scale), spec)


def _read(path: Path) -> ClusterSpec:
    try:
        text = path.read_text(encoding="utf-8")
        data = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
        return parse_cluster(data)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, HelixError) as error:
        raise ConfigError(f"{path}: {error}") from error
