"""A cluster file on disk, JSON or TOML, to a ClusterSpec; every complaint names the file, the line and the key."""

import json
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

from helixd.commands.failure import CommandFailed
from helixd.commands.model_sizes import model_of
from helixd.commands.positions import line_of
from helixd.exits import Exit
from helixd.layers import LayerRange
from helixd.plan.cluster.clusterfile import ClusterFileError, parse_cluster, unknown_keys
from helixd.plan.cluster.spec import ClusterSpec


def load_cluster(path: Path, *, model: str | None = None) -> ClusterSpec:
    """The cluster in a `helixd-cluster/1` file, for the checkpoint `model` if one is named. Raises CommandFailed."""
    text = read_text(path)
    toml = is_toml(path, text)
    data = parse_toml(text, path) if toml else parse_json(text, path)
    if not isinstance(data, dict):
        raise CommandFailed(f"{path}: must hold a table of keys, not {type(data).__name__}", Exit.BAD_DATA)
    wanted = model_of(model) if model is not None else None

    def place(key: str) -> str:
        line = line_of(text, key, toml=toml)
        return f"{path}:{line}" if line is not None else str(path)

    try:
        spec = parse_cluster(data, model=wanted)
    except ClusterFileError as error:
        raise CommandFailed(f"{place(error.key)}: {error}", Exit.BAD_DATA) from error
    for key, near in unknown_keys(data):
        meant = f"; did you mean {near}?" if near else ""
        print(f"{place(key)}: {key}: is not a key of this format and was ignored{meant}", file=sys.stderr)
    return spec


def with_current(spec: ClusterSpec, path: Path) -> ClusterSpec:
    """The cluster whose nodes hold what a plan file says: `{"placement": {node id: [start, end)}}`.

    Nodes of the plan that the cluster does not have are gone, and left out. Raises CommandFailed.
    """
    data = parse_json(read_text(path), path)
    placement = data.get("placement") if isinstance(data, dict) else None
    if not isinstance(placement, dict):
        raise CommandFailed(
            f"{path}: placement: is missing; a plan file is what helixd plan --json prints", Exit.BAD_DATA
        )
    held: dict[str, LayerRange] = {}
    for node, pair in placement.items():
        try:
            start, end = pair
            if type(start) is not int or type(end) is not int:
                raise TypeError
            held[node] = LayerRange(start, end)
        except (TypeError, ValueError):
            raise CommandFailed(f"{path}: placement.{node}: must be [start, end), is {pair!r}", Exit.BAD_DATA) from None
        if held[node].end > spec.model.num_layers:
            problem = f"{held[node]} is not a range of the model's {spec.model.num_layers} layers"
            raise CommandFailed(f"{path}: placement.{node}: {problem}", Exit.BAD_DATA)
    if not held.keys() & {node.id for node in spec.nodes}:
        raise CommandFailed(f"{path}: placement: none of its nodes is in cluster {spec.name}", Exit.BAD_DATA)
    return replace(spec, nodes=tuple(replace(node, current_range=held.get(node.id)) for node in spec.nodes))


def read_text(path: Path) -> str:
    """The file's text. Raises CommandFailed."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise CommandFailed(f"{path}: cannot be read: {error.strerror}", Exit.NO_INPUT) from error
    except UnicodeDecodeError as error:
        raise CommandFailed(f"{path}: is not UTF-8 (byte {error.start})", Exit.BAD_DATA) from error


def is_toml(path: Path, text: str) -> bool:
    """By its name, else by how it begins."""
    if path.suffix.lower() in (".toml", ".json"):
        return path.suffix.lower() == ".toml"
    return not text.lstrip().startswith(("{", "["))


def parse_json(text: str, path: Path) -> object:
    """The JSON value of a file. Raises CommandFailed with the line."""
    try:
        value: object = json.loads(text)
    except json.JSONDecodeError as error:
        raise CommandFailed(f"{path}:{error.lineno}: not valid JSON: {error.msg}", Exit.BAD_DATA) from error
    except (ValueError, RecursionError) as error:
        raise CommandFailed(f"{path}: not valid JSON: {error}", Exit.BAD_DATA) from error
    return value


def parse_toml(text: str, path: Path) -> object:
    """The TOML document of a file. Raises CommandFailed with the line."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        before, _, place = str(error).rpartition(" (at ")
        line = place.removeprefix("line ").split(",")[0]
        if not line.isdigit():  # "at end of document"
            line = str(len(text.splitlines()) or 1)
        raise CommandFailed(f"{path}:{line}: not valid TOML: {before or error}", Exit.BAD_DATA) from error
    except (ValueError, RecursionError) as error:
        raise CommandFailed(f"{path}: is not TOML that can be read: {error}", Exit.BAD_DATA) from error
