"""The types of nodes in a cluster file: measured tables where it has them, estimates where it names hardware.

A type with layer times is a measured one. A type with only `hardware` (or a node that names hardware and no type) is
estimated from the datasheet. For another model than the file's, layer times that were measured are scaled by how much
more or less a layer has to do, and are estimates from then on.
"""

from dataclasses import replace
from typing import NoReturn

from helixd.plan.cluster.filetable import ClusterFileError, Table
from helixd.plan.cluster.hardware import HARDWARE, Hardware, find_hardware, near_names
from helixd.plan.cluster.profile import NodeMeasurement, TypeTimes, derive_throughput, kv_rooms
from helixd.plan.cluster.roofline import estimate
from helixd.plan.cluster.spec import BatchLimits, LayerWork, ModelSpec, NodeProfile, WorkloadSpec


class Types:
    """The `node_types` of a file. `own`: the file's model, if it has one; `wanted`: the one to plan for."""

    def __init__(self, tables: Table, own: ModelSpec | None, wanted: ModelSpec | None) -> None:
        assert wanted is not None
        self.model = wanted
        self._own = own
        self._tables = tables
        # Types that nodes make by naming hardware themselves: their tables, by the name made for them.
        self._made: dict[str, Table] = {}

    def of_node(self, node: Table) -> str:
        """The name of a node's type. Raises ClusterFileError."""
        names = self._tables.keys()
        if node.has("type"):
            kind = node.text("type")
            if kind in names:
                for key in ("hardware", "memory_bytes"):
                    if node.has(key):
                        node.fail(key, f"is said of type {kind!r}; give the node a type of its own")
                return kind
            if not node.has("hardware"):
                if not names:
                    raise ClusterFileError("node_types", f"is missing, and {node.key('type')} is {kind!r}")
                listed = ", ".join(sorted(names))
                node.fail("type", f"{kind!r} is not in node_types ({listed}), and the node names no hardware")
        elif not node.has("hardware"):
            node.fail("type", "is missing; name a type of node_types, or hardware")
        kind = node.text("type") if node.has("type") else _hardware(node).name
        if node.has("memory_bytes"):
            kind += f" {node.number('memory_bytes', above=True) / 1e9:g} GB"
        self._made.setdefault(kind, node)
        return kind

    def profiles(self, workload: WorkloadSpec) -> dict[str, NodeProfile]:
        """All types, with T(j) derived where it is not given. Raises ClusterFileError."""
        tables = {name: self._tables.table(name) for name in self._tables.keys()} | self._made  # noqa: SIM118
        profiles = {name: self._profile(table, name, workload) for name, table in tables.items()}
        missing = {name for name, found in profiles.items() if not found.throughput_tokens_per_s and found.max_layers}
        if not missing:
            return profiles
        times = {
            name: TypeTimes(p.prompt_layer_time_s, p.decode_layer_time_s, p.kv_capacity_token_layers[: p.max_layers])
            for name, p in profiles.items()
            if p.prompt_layer_time_s and p.decode_layer_time_s
        }
        derived = derive_throughput(times, workload, self.model.num_layers)
        return {
            name: replace(profile, throughput_tokens_per_s=derived[name]) if name in missing else profile
            for name, profile in profiles.items()
        }

    def with_headroom(self, profile: NodeProfile, headroom_bytes: float) -> NodeProfile:
        """A profile of a node that must leave so much of its memory free."""
        if headroom_bytes <= 0 or not profile.kv_capacity_token_layers:
            return profile
        room = profile.kv_capacity_token_layers
        per_byte = (room[0] - room[1]) / self.model.layer_bytes if len(room) > 1 else 0.0
        if per_byte <= 0:
            per_byte = room[0] / max(1.0, profile.memory_bytes - self.model.layer_bytes)
        left = [kv - headroom_bytes * per_byte for kv in room]
        # What serves nothing is not held; a type's own limit stays.
        layers = sum(kv > 0 for kv in left[: profile.max_layers])
        return replace(
            profile,
            memory_bytes=max(0.0, profile.memory_bytes - headroom_bytes),
            max_layers=layers,
            kv_capacity_token_layers=tuple(left[:layers]),
            throughput_tokens_per_s=profile.throughput_tokens_per_s[:layers],
        )

    def _profile(self, table: Table, name: str, workload: WorkloadSpec) -> NodeProfile:
        if table.has("hardware") and not table.has("prompt_layer_time_s") and not table.has("throughput_tokens_per_s"):
            hardware, work = _hardware(table), self._work(table)
            memory = table.number("memory_bytes", above=True) if table.has("memory_bytes") else None
            if memory is None and hardware.memory_bytes is None:
                table.fail("memory_bytes", f"is missing: {hardware.name} is sold with different memories")
            found = estimate(hardware, self.model, work, workload, memory_bytes=memory, type_name=name)
            return self._estimated(found, work, workload, table)
        if self._own is not None and self._own is not self.model:
            return self._scaled(_measured(table, name, self._own), self._own, workload, table)
        return _measured(table, name, self.model)

    def _work(self, table: Table) -> LayerWork:
        if self.model.work is None:
            table.fail("hardware", "can be estimated only if model.kv_bytes_per_token_layer is given")
        return self.model.work

    def _scaled(self, found: NodeProfile, own: ModelSpec, workload: WorkloadSpec, table: Table) -> NodeProfile:
        """Measured layer times for one model as estimates for another."""
        work = self._work(table)
        if not found.prompt_layer_time_s or not found.decode_layer_time_s:
            table.fail("prompt_layer_time_s", "is missing, or hardware: nothing says how fast another model would be")
        own_flops = own.work.flops_per_token if own.work is not None else own.layer_bytes
        sums = work.flops_per_token / own_flops
        read = self.model.layer_bytes / own.layer_bytes
        scaled = NodeMeasurement(
            type=found.type,
            memory_bytes=found.memory_bytes,
            prompt_layer_time_s=tuple((n, seconds * sums) for n, seconds in found.prompt_layer_time_s),
            decode_layer_time_s=tuple((n, seconds * read) for n, seconds in found.decode_layer_time_s),
        )
        return self._estimated(scaled, work, workload, table)

    def _estimated(self, found: NodeMeasurement, work: LayerWork, workload: WorkloadSpec, table: Table) -> NodeProfile:
        # Every layer held must keep at least one mean request.
        least = max(workload.min_kv_tokens, workload.mean_input_tokens + workload.mean_output_tokens)
        rooms = kv_rooms(found.memory_bytes, self.model, work.kv_bytes_per_token, least)
        return NodeProfile(
            type=found.type,
            memory_bytes=found.memory_bytes,
            max_layers=len(rooms),
            throughput_tokens_per_s=(),
            kv_capacity_token_layers=rooms,
            prompt_layer_time_s=found.prompt_layer_time_s,
            decode_layer_time_s=found.decode_layer_time_s,
            estimated=True,
        )


def _hardware(table: Table) -> Hardware:
    name = table.text("hardware")
    found = find_hardware(name)
    if found is None:
        _unknown_hardware(table, name)
    return found


def _unknown_hardware(table: Table, name: str) -> NoReturn:
    near = near_names(name)
    meant = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known: {', '.join(HARDWARE)}"
    table.fail("hardware", f"{name!r} is not in the table of datasheets; {meant}")


def _measured(table: Table, name: str, model: ModelSpec) -> NodeProfile:
    max_layers = min(table.whole("max_layers"), model.num_layers)
    kv = table.numbers("kv_capacity_token_layers")
    throughput = table.numbers("throughput_tokens_per_s") if table.has("throughput_tokens_per_s") else ()
    given = {"kv_capacity_token_layers": kv} | ({"throughput_tokens_per_s": throughput} if throughput else {})
    for key, values in given.items():
        if len(values) < max_layers:
            table.fail(key, f"has {len(values)} values, max_layers is {max_layers}")
    if not throughput and max_layers:
        for key in ("prompt_layer_time_s", "decode_layer_time_s"):
            if not table.has(key):
                table.fail(key, "is missing, and so is throughput_tokens_per_s which it would give")
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
