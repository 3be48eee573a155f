"""Values that are left empty to be found: directories, names, peer address, secrets that systemd passes in."""

import dataclasses
import socket
from collections.abc import Mapping
from pathlib import Path

from helixd.config.address import Address
from helixd.config.kinds import DEMO_MODEL, UNSET_ADDRESS, UNSET_PATH
from helixd.config.schema import KeyPath
from helixd.config.sections import Config
from helixd.config.sources import xdg_directory
from helixd.files import served_name

COORDINATOR_PEER_PORT = 7070
WORKER_PEER_PORT = 7071


def derive(config: Config, env: Mapping[str, str]) -> tuple[Config, dict[KeyPath, str]]:
    """`config` with empty values filled in, and for each filled key where its value came from."""
    origins: dict[KeyPath, str] = {}
    node, model, api, cluster = config.node, config.model, config.api, config.cluster
    if node.state_dir == UNSET_PATH:
        path, origins["node", "state_dir"] = _directory(env, "STATE_DIRECTORY", "XDG_STATE_HOME", ".local/state")
        node = dataclasses.replace(node, state_dir=path)
    if node.cache_dir == UNSET_PATH:
        path, origins["node", "cache_dir"] = _directory(env, "CACHE_DIRECTORY", "XDG_CACHE_HOME", ".cache")
        node = dataclasses.replace(node, cache_dir=path)
    if not node.name:
        node = dataclasses.replace(node, name=socket.gethostname())
        origins["node", "name"] = "default, the host's name"
    if not model.name and model.path:
        name = DEMO_MODEL if model.path == DEMO_MODEL else served_name(Path(model.path))
        model = dataclasses.replace(model, name=name)
        origins["model", "name"] = "default, from model.path"
    if cluster.listen == UNSET_ADDRESS:
        cluster = dataclasses.replace(cluster, listen=_peer_address(config))
        origins["cluster", "listen"] = "default, from the role"
    if cluster.secret_file is None and (secret := _credential(env, "cluster-secret")):
        cluster = dataclasses.replace(cluster, secret_file=secret)
        origins["cluster", "secret_file"] = "$CREDENTIALS_DIRECTORY"
    if api.keys_file is None and (keys := _credential(env, "api-keys")):
        api = dataclasses.replace(api, keys_file=keys)
        origins["api", "keys_file"] = "$CREDENTIALS_DIRECTORY"
    return dataclasses.replace(config, node=node, model=model, api=api, cluster=cluster), origins


def _directory(env: Mapping[str, str], service: str, xdg: str, fallback: str) -> tuple[Path, str]:
    # systemd lists several directories with colons; the first is the unit's own.
    if first := env.get(service, "").split(":")[0]:
        return Path(first), f"${service}"
    return xdg_directory(env, xdg, fallback), f"default, from ${xdg if env.get(xdg) else 'HOME'}"


def _peer_address(config: Config) -> Address:
    if config.coordinates:
        return Address("127.0.0.1", COORDINATOR_PEER_PORT)
    coordinator = config.cluster.coordinator
    if coordinator is None or coordinator.loopback:
        return Address("127.0.0.1", 0)
    return Address("0.0.0.0", WORKER_PEER_PORT)  # noqa: S104 (refused without a secret or insecure_open)


def _credential(env: Mapping[str, str], name: str) -> Path | None:
    directory = env.get("CREDENTIALS_DIRECTORY")
    if not directory:
        return None
    path = Path(directory) / name
    return path if path.is_file() else None
