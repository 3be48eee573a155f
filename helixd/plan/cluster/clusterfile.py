"""Cluster files, format `helixd-cluster/1`: parsed data (JSON or TOML, read by the caller) -> ClusterSpec.

Every complaint names the key it is about. Unknown keys are ignored, so that files may carry notes; `unknown_keys` says
which they are. Where a type has no `throughput_tokens_per_s` it is derived from its layer times, KV room and the
workload; where it has no layer times either, from what its hardware's datasheet says.
"""

from collections.abc import Mapping
from difflib import get_close_matches

from helixd.ids import NodeId
from helixd.plan.cluster.clustertypes import Types
from helixd.plan.cluster.filetable import ClusterFileError, Table, number_of
from helixd.plan.cluster.spec import (
    COORDINATOR,
    ClusterSpec,
    LayerWork,
    LinkSpec,
    ModelSpec,
    NodeProfile,
    NodeSpec,
    WorkloadSpec,
)

__all__ = ["FORMAT", "ClusterFileError", "parse_cluster", "unknown_keys"]

FORMAT = "helixd-cluster/1"
_DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}

_KNOWN = {
    "": ("format", "name", "model", "coordinator", "node_types", "nodes", "links", "default_link", "workload"),
    "model": (
        "name", "num_layers", "layer_bytes", "activation_bytes", "token_bytes", "embedding_bytes", "head_bytes",
        "kv_bytes_per_token_layer", "flops_per_token_layer", "dtype",
    ),
    "coordinator": ("nic_in_bytes_per_s", "nic_out_bytes_per_s"),
    "default_link": ("bandwidth_bytes_per_s", "latency_s"),
    "workload": (
        "mean_input_tokens", "mean_output_tokens", "kv_fraction", "min_kv_tokens", "typical_layers", "fleet",
    ),
    "nodes": (
        "id", "type", "hardware", "memory_bytes", "memory_headroom_bytes", "region", "nic_in_bytes_per_s",
        "nic_out_bytes_per_s", "min_layers", "max_layers", "exclude", "fixed_range", "current_range",
    ),
    "node_types": (
        "hardware", "memory_bytes", "max_layers", "throughput_tokens_per_s", "kv_capacity_token_layers",
        "prompt_layer_time_s", "decode_layer_time_s", "batch_limits",
    ),
}  # fmt: skip


def parse_cluster(data: Mapping[str, object], *, model: ModelSpec | None = None) -> ClusterSpec:
    """The cluster that `data` describes, for `model` if one is given instead of its own.

    Raises ClusterFileError naming the first bad key.
    """
    top = Table(data, "")
    found = top.text("format")
    if found != FORMAT:
        top.fail("format", f"is {found!r}; this version reads {FORMAT!r}")
    own = _model(top.table("model")) if model is None or top.has("model") else None
    nodes_in = top.tables("nodes")
    if not nodes_in:
        top.fail("nodes", "is empty; a cluster has at least one node")
    types = Types(top.table("node_types", optional=True), own, model or own)
    kinds = [types.of_node(entry) for entry in nodes_in]
    workload = _workload(top.table("workload", optional=True), {kind: kinds.count(kind) for kind in kinds})
    profiles = types.profiles(workload)
    used = types.model
    nodes = tuple(
        _node(entry, types, kind, profiles, used) for entry, kind in zip(nodes_in, kinds, strict=True)
    )  # fmt: skip
    seen: set[NodeId] = set()
    for i, node in enumerate(nodes):
        if node.id in seen:
            top.fail(f"nodes[{i}].id", f"{node.id!r} occurs twice")
        seen.add(node.id)
    coordinator = top.table("coordinator", optional=True)
    return ClusterSpec(
        name=top.text("name", default="cluster"),
        model=used,
        nodes=nodes,
        links=_links(top, [node.id for node in nodes]),
        workload=workload,
        coordinator_nic_in_bytes_per_s=coordinator.number_or_none("nic_in_bytes_per_s"),
        coordinator_nic_out_bytes_per_s=coordinator.number_or_none("nic_out_bytes_per_s"),
    )


def unknown_keys(data: Mapping[str, object]) -> list[tuple[str, str | None]]:
    """Keys that mean nothing here, and the known one that was perhaps meant. `data` has been parsed before."""
    tables: list[tuple[str, str, object]] = [("", "", data)]
    tables += [(name, name, data.get(name)) for name in ("model", "coordinator", "default_link", "workload")]
    nodes, types = data.get("nodes"), data.get("node_types")
    tables += [(f"nodes[{i}]", "nodes", entry) for i, entry in enumerate(nodes if isinstance(nodes, list) else ())]
    tables += [
        (f"node_types.{name}", "node_types", entry)
        for name, entry in (types.items() if isinstance(types, Mapping) else ())
    ]
    found: list[tuple[str, str | None]] = []
    for path, kind, table in tables:
        for key in table if isinstance(table, Mapping) else ():
            if key not in _KNOWN[kind]:
                near = get_close_matches(str(key), _KNOWN[kind], 1)
                found.append((f"{path}.{key}" if path else str(key), near[0] if near else None))
    return found


def _model(table: Table) -> ModelSpec:
    return ModelSpec(
        name=table.text("name", default="model"),
        num_layers=table.whole("num_layers", least=1),
        layer_bytes=table.number("layer_bytes", above=True),
        activation_bytes=table.number("activation_bytes", above=True),
        token_bytes=table.number("token_bytes", above=True),
        embedding_bytes=table.number("embedding_bytes", default=0.0),
        head_bytes=table.number("head_bytes", default=0.0),
        work=_work(table),
    )


def _work(table: Table) -> LayerWork | None:
    """For estimates; None if the file does not say how large the KV of a token is."""
    if not table.has("kv_bytes_per_token_layer"):
        return None
    dtype = table.text("dtype", default="bfloat16")
    if dtype not in _DTYPE_BYTES:
        table.fail("dtype", f"{dtype!r} is none of {', '.join(_DTYPE_BYTES)}")
    # Two operations per weight and token; a mixture of experts does fewer and says so.
    dense = 2 * table.number("layer_bytes") / _DTYPE_BYTES[dtype]
    return LayerWork(
        kv_bytes_per_token=table.number("kv_bytes_per_token_layer", above=True),
        flops_per_token=table.number("flops_per_token_layer", above=True, default=dense),
        dtype=dtype,
    )


def _workload(table: Table, counts: Mapping[str, int]) -> WorkloadSpec:
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


def _node(
    table: Table, types: Types, kind: str, profiles: Mapping[str, NodeProfile], model: ModelSpec
) -> NodeSpec:  # fmt: skip
    node_id = table.text("id")
    if node_id == COORDINATOR:
        table.fail("id", f"{node_id!r} is the coordinator's own id")
    return NodeSpec(
        id=NodeId(node_id),
        profile=types.with_headroom(profiles[kind], table.number("memory_headroom_bytes", default=0.0)),
        region=table.text("region", default="") if table.has("region") else "",
        nic_in_bytes_per_s=table.number_or_none("nic_in_bytes_per_s"),
        nic_out_bytes_per_s=table.number_or_none("nic_out_bytes_per_s"),
        min_layers=table.whole_or_none("min_layers"),
        max_layers=table.whole_or_none("max_layers"),
        exclude=table.flag("exclude"),
        fixed_range=table.range("fixed_range", model.num_layers),
        current_range=table.range("current_range", model.num_layers),
    )


def _links(top: Table, nodes: list[NodeId]) -> tuple[LinkSpec, ...]:
    links: dict[tuple[str, str], LinkSpec] = {}
    known = {*nodes, COORDINATOR}
    default = top.table("default_link", optional=True)
    for i, item in enumerate(top.items("links") if top.has("links") or not top.has("default_link") else ()):
        key = f"links[{i}]"
        if not isinstance(item, list | tuple) or len(item) != 4:
            top.fail(key, "must be [src, dst, bandwidth_bytes_per_s, latency_s]")
        src, dst = item[0], item[1]
        for end in (src, dst):
            if end not in known:
                top.fail(key, f"{end!r} is neither a node's id nor {COORDINATOR!r}")
        if src == dst:
            top.fail(key, f"goes from {src!r} to itself")
        if (src, dst) in links:
            top.fail(key, f"{src!r} -> {dst!r} occurs twice")
        links[src, dst] = LinkSpec(NodeId(src), NodeId(dst), number_of(item[2], key), number_of(item[3], key))
    if top.has("default_link"):
        rate, latency = default.number("bandwidth_bytes_per_s"), default.number("latency_s")
        ends = [COORDINATOR, *nodes]
        for src in ends:
            for dst in ends:
                if src != dst and (src, dst) not in links:
                    links[src, dst] = LinkSpec(src, dst, rate, latency)
    return tuple(links.values())
