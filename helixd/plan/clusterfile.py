"""Cluster files, format `helixd-cluster/1`: parsed data (JSON or TOML, read by the caller) -> ClusterSpec.

Every complaint names the key it is about. Unknown keys are ignored, so that files may carry notes. Where a type has
no `throughput_tokens_per_s` it is derived from its layer times, KV room and the workload.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NoReturn

from helixd.errors import HelixError
from helixd.ids import NodeId
from helixd.layers import LayerRange
from helixd.plan.profile import TypeTimes, derive_throughput
from helixd.plan.spec import (
    COORDINATOR,
    BatchLimits,
    ClusterSpec,
    LinkSpec,
    ModelSpec,
    NodeProfile,
    NodeSpec,
    WorkloadSpec,
)

FORMAT = "helixd-cluster/1"


class ClusterFileError(HelixError):
    """The data is not a cluster; `key` is the path of the offending key, such as `nodes[3].type`."""

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(f"{key}: {problem}")
        self.key = key


def parse_cluster(data: Mapping[str, object]) -> ClusterSpec:
    """The cluster that `data` describes. Raises ClusterFileError naming the first bad key."""
    top = _Table(data, "")
    found = top.text("format")
    if found != FORMAT:
        top.fail("format", f"is {found!r}; this version reads {FORMAT!r}")
    model = _model(top.table("model"))
    nodes_in = top.tables("nodes")
    if not nodes_in:
        top.fail("nodes", "is empty; a cluster has at least one node")
    counts: dict[str, int] = {}
    for entry in nodes_in:
        counts[entry.text("type")] = counts.get(entry.text("type"), 0) + 1
    workload = _workload(top.table("workload", optional=True), counts)
    types = top.table("node_types")
    profiles = {name: _profile(types.table(name), name, model) for name in types.keys()}  # noqa: SIM118
    profiles = _with_throughput(profiles, workload, model, types)
    nodes = tuple(_node(entry, profiles, model) for entry in nodes_in)
    seen: set[NodeId] = set()
    for i, node in enumerate(nodes):
        if node.id in seen:
            top.fail(f"nodes[{i}].id", f"{node.id!r} occurs twice")
        seen.add(node.id)
    coordinator = top.table("coordinator", optional=True)
    return ClusterSpec(
        name=top.text("name", default="cluster"),
        model=model,
        nodes=nodes,
        links=_links(top, seen),
        workload=workload,
        coordinator_nic_in_bytes_per_s=coordinator.number_or_none("nic_in_bytes_per_s"),
        coordinator_nic_out_bytes_per_s=coordinator.number_or_none("nic_out_bytes_per_s"),
    )


class _Table:
    """A mapping and where it stands, so that every complaint can name its key."""

    def __init__(self, data: object, path: str) -> None:
        if not isinstance(data, Mapping):
            raise ClusterFileError(path or "top level", f"must be a table, is {_kind(data)}")
        self._data = data
        self._path = path

    def key(self, name: str) -> str:
        return f"{self._path}.{name}" if self._path else name

    def fail(self, name: str, problem: str) -> NoReturn:
        raise ClusterFileError(self.key(name), problem)

    def keys(self) -> list[str]:
        return [str(name) for name in self._data]

    def get(self, name: str) -> object:
        if name not in self._data:
            self.fail(name, "is missing")
        return self._data[name]

    def has(self, name: str) -> bool:
        return self._data.get(name) is not None

    def table(self, name: str, *, optional: bool = False) -> "_Table":
        if optional and not self.has(name):
            return _Table({}, self.key(name))
        return _Table(self.get(name), self.key(name))

    def items(self, name: str) -> Sequence[object]:
        value = self.get(name)
        if not isinstance(value, list | tuple):
            self.fail(name, f"must be a list, is {_kind(value)}")
        return value

    def tables(self, name: str) -> list["_Table"]:
        return [_Table(item, f"{self.key(name)}[{i}]") for i, item in enumerate(self.items(name))]

    def text(self, name: str, *, default: str | None = None) -> str:
        if default is not None and not self.has(name):
            return default
        value = self.get(name)
        if not isinstance(value, str) or not value:
            self.fail(name, f"must be a non-empty string, is {_kind(value)}")
        return value

    def number(self, name: str, *, least: float = 0.0, above: bool = False, default: float | None = None) -> float:
        if default is not None and not self.has(name):
            return default
        return _number(self.get(name), self.key(name), least=least, above=above)

    def number_or_none(self, name: str) -> float | None:
        return self.number(name) if self.has(name) else None

    def whole(self, name: str, *, least: int = 0) -> int:
        return _whole(self.get(name), self.key(name), least=least)

    def whole_or_none(self, name: str, *, least: int = 0) -> int | None:
        return self.whole(name, least=least) if self.has(name) else None

    def numbers(self, name: str) -> tuple[float, ...]:
        return tuple(_number(item, f"{self.key(name)}[{i}]") for i, item in enumerate(self.items(name)))

    def points(self, name: str) -> tuple[tuple[float, float], ...]:
        if not self.has(name):
            return ()
        points: list[tuple[float, float]] = []
        for i, item in enumerate(self.items(name)):
            key = f"{self.key(name)}[{i}]"
            if not isinstance(item, list | tuple) or len(item) != 2:
                raise ClusterFileError(key, "must be [tokens in the batch, seconds for one layer]")
            point = (_number(item[0], key), _number(item[1], key))
            if points and point[0] <= points[-1][0]:
                raise ClusterFileError(key, "batch sizes must rise from point to point")
            points.append(point)
        return tuple(points)

    def range(self, name: str, num_layers: int) -> LayerRange | None:
        if not self.has(name):
            return None
        pair = self.items(name)
        if len(pair) != 2:
            self.fail(name, "must be [start, end)")
        start, end = (_whole(value, self.key(name)) for value in pair)
        if not start < end <= num_layers:
            self.fail(name, f"[{start}, {end}) is not a range of the model's {num_layers} layers")
        return LayerRange(start, end)


def _model(table: _Table) -> ModelSpec:
    return ModelSpec(
        name=table.text("name", default="model"),
        num_layers=table.whole("num_layers", least=1),
        layer_bytes=table.number("layer_bytes", above=True),
        activation_bytes=table.number("activation_bytes", above=True),
        token_bytes=table.number("token_bytes", above=True),
        embedding_bytes=table.number("embedding_bytes", default=0.0),
        head_bytes=table.number("head_bytes", default=0.0),
    )


def _workload(table: _Table, counts: Mapping[str, int]) -> WorkloadSpec:
    default = WorkloadSpec()
    typical = table.table("typical_layers", optional=True)
    fleet = table.table("fleet", optional=True)
    return WorkloadSpec(
        mean_input_tokens=table.number("mean_input_tokens", above=True, default=default.mean_input_tokens),
        mean_output_tokens=table.number("mean_output_tokens", above=True, default=default.mean_output_tokens),
        kv_fraction=table.number("kv_fraction", above=True, default=default.kv_fraction),
        min_kv_tokens=table.number("min_kv_tokens", default=default.min_kv_tokens),
        typical_layers={name: typical.whole(name, least=1) for name in typical.keys()},  # noqa: SIM118
        fleet={name: fleet.whole(name) for name in fleet.keys()} or dict(counts),  # noqa: SIM118
    )


def _profile(table: _Table, name: str, model: ModelSpec) -> NodeProfile:
    max_layers = min(table.whole("max_layers"), model.num_layers)
    kv = table.numbers("kv_capacity_token_layers")
    throughput = table.numbers("throughput_tokens_per_s") if table.has("throughput_tokens_per_s") else ()
    given = {"kv_capacity_token_layers": kv} | ({"throughput_tokens_per_s": throughput} if throughput else {})
    for key, values in given.items():
        if len(values) < max_layers:
            table.fail(key, f"has {len(values)} values, max_layers is {max_layers}")
    limits = [
        BatchLimits(
            prompt_max_requests=entry.number_or_none("prompt_max_requests"),
            prompt_max_tokens=entry.number_or_none("prompt_max_tokens"),
            decode_max_tokens=entry.number_or_none("decode_max_tokens"),
            decode_max_context=entry.number_or_none("decode_max_context"),
        )
        for entry in (table.tables("batch_limits") if table.has("batch_limits") else ())
    ]
    return NodeProfile(
        type=name,
        memory_bytes=table.number("memory_bytes"),
        max_layers=max_layers,
        throughput_tokens_per_s=throughput,
        kv_capacity_token_layers=kv,
        prompt_layer_time_s=table.points("prompt_layer_time_s"),
        decode_layer_time_s=table.points("decode_layer_time_s"),
        batch_limits=tuple(limits),
    )


def _with_throughput(
    profiles: Mapping[str, NodeProfile], workload: WorkloadSpec, model: ModelSpec, types: _Table
) -> dict[str, NodeProfile]:
    missing = {name for name, profile in profiles.items() if not profile.throughput_tokens_per_s and profile.max_layers}
    if not missing:
        return dict(profiles)
    for name in sorted(missing):
        for key in ("prompt_layer_time_s", "decode_layer_time_s"):
            if not types.table(name).has(key):
                types.table(name).fail(key, "is missing, and so is throughput_tokens_per_s which it would give")
    times = {
        name: TypeTimes(p.prompt_layer_time_s, p.decode_layer_time_s, p.kv_capacity_token_layers[: p.max_layers])
        for name, p in profiles.items()
        if p.prompt_layer_time_s and p.decode_layer_time_s
    }
    derived = derive_throughput(times, workload, model.num_layers)
    return {
        name: replace(profile, throughput_tokens_per_s=derived[name]) if name in missing else profile
        for name, profile in profiles.items()
    }


def _node(table: _Table, profiles: Mapping[str, NodeProfile], model: ModelSpec) -> NodeSpec:
    kind = table.text("type")
    if kind not in profiles:
        table.fail("type", f"{kind!r} is not in node_types ({', '.join(sorted(profiles)) or 'which is empty'})")
    node_id = table.text("id")
    if node_id == COORDINATOR:
        table.fail("id", f"{node_id!r} is the coordinator's own id")
    exclude = table.get("exclude") if table.has("exclude") else False
    if not isinstance(exclude, bool):
        table.fail("exclude", f"must be true or false, is {_kind(exclude)}")
    return NodeSpec(
        id=NodeId(node_id),
        profile=profiles[kind],
        region=table.text("region", default="") if table.has("region") else "",
        nic_in_bytes_per_s=table.number_or_none("nic_in_bytes_per_s"),
        nic_out_bytes_per_s=table.number_or_none("nic_out_bytes_per_s"),
        min_layers=table.whole_or_none("min_layers"),
        max_layers=table.whole_or_none("max_layers"),
        exclude=exclude,
        fixed_range=table.range("fixed_range", model.num_layers),
        current_range=table.range("current_range", model.num_layers),
    )


def _links(top: _Table, nodes: set[NodeId]) -> tuple[LinkSpec, ...]:
    links: list[LinkSpec] = []
    seen: set[tuple[str, str]] = set()
    for i, item in enumerate(top.items("links")):
        key = f"links[{i}]"
        if not isinstance(item, list | tuple) or len(item) != 4:
            top.fail(key, "must be [src, dst, bandwidth_bytes_per_s, latency_s]")
        src, dst = item[0], item[1]
        for end in (src, dst):
            if end != COORDINATOR and end not in nodes:
                top.fail(key, f"{end!r} is neither a node's id nor {COORDINATOR!r}")
        if src == dst:
            top.fail(key, f"goes from {src!r} to itself")
        if (src, dst) in seen:
            top.fail(key, f"{src!r} -> {dst!r} occurs twice")
        seen.add((src, dst))
        links.append(LinkSpec(NodeId(src), NodeId(dst), _number(item[2], key), _number(item[3], key)))
    return tuple(links)


def _number(value: object, key: str, *, least: float = 0.0, above: bool = False) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ClusterFileError(key, f"must be a number, is {_kind(value)}")
    # Written so that NaN is refused too.
    if not (least < value if above else least <= value) or value == float("inf"):
        raise ClusterFileError(key, f"must be {'above' if above else 'at least'} {least:g}, is {value}")
    return float(value)


def _whole(value: object, key: str, *, least: int = 0) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ClusterFileError(key, f"must be a whole number, is {_kind(value)}")
    if value < least:
        raise ClusterFileError(key, f"must be at least {least}, is {value}")
    return value


def _kind(value: object) -> str:
    names = {type(None): "null", bool: "true or false", str: "a string", list: "a list", dict: "a table"}
    return names.get(type(value), f"{value!r}")
