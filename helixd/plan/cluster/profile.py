"""T(j) and KV room of nodes from what was measured: layer times, memory, the workload's mean lengths.

The derivation is the paper's (Helix, arXiv 2406.01566): a node that holds j of L layers is visited for the share w
of a round that its layers take of the fleet's mean; its KV room at j layers gives the sequences it can keep, hence
the prompts and decodes of a step, hence tokens/s. T(j) therefore depends on the whole fleet and on the workload.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from helixd.ids import NodeId
from helixd.plan.cluster.spec import ModelSpec, NodeProfile, WorkloadSpec

Points = Sequence[tuple[float, float]]

# Share of its maximum that a node of unknown typical holding is taken to hold; the paper's clusters have 0.57-0.75.
_TYPICAL_SHARE = 0.65
_ROUNDS = 10
_PAPER_START = {"A100": 80.0, "V100": 40.0, "L4": 20.0, "L4x2": 30.0, "T4": 12.5, "T4x2": 20.0, "T4x4": 30.0}


@dataclass(frozen=True, slots=True)
class TypeTimes:
    """Layer times and KV room of one kind of node, as in `NodeProfile`."""

    prompt_layer_time_s: tuple[tuple[float, float], ...]
    decode_layer_time_s: tuple[tuple[float, float], ...]
    kv_capacity_token_layers: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class NodeMeasurement:
    """What a node reported: memory for weights and KV together, seconds for one layer by batch (see `NodeProfile`).

    Every node is measured on random weights of the model's shape, before any placement.
    """

    type: str
    memory_bytes: float
    prompt_layer_time_s: tuple[tuple[float, float], ...]
    decode_layer_time_s: tuple[tuple[float, float], ...]


def layer_time_s(points: Points, batch: float) -> float:
    """Seconds for one layer: linear between points, level before the first, the last slope beyond the last.

    Raises ValueError if there are no points.
    """
    if not points:
        raise ValueError("no layer times were measured")
    first_x, first_y = points[0]
    if batch <= first_x or len(points) == 1:
        return first_y
    low, high = next((pair for pair in pairwise(points) if batch <= pair[1][0]), (points[-2], points[-1]))
    return low[1] + (high[1] - low[1]) * (batch - low[0]) / (high[0] - low[0])


def derive_throughput(
    types: Mapping[str, TypeTimes], workload: WorkloadSpec, num_layers: int
) -> dict[str, tuple[float, ...]]:
    """T(j) in tokens/s (prompt and decode together) per type, index j-1, for every j its KV room is given for.

    `workload.fleet` counts the nodes of each type (a missing type counts once); `workload.typical_layers` is what
    a node of a type holds typically (missing: a fixed share of the most it holds).
    """
    holders = {name: times for name, times in types.items() if times.kv_capacity_token_layers}
    typical = {
        name: min(
            workload.typical_layers.get(name) or max(1, round(_TYPICAL_SHARE * len(times.kv_capacity_token_layers))),
            len(times.kv_capacity_token_layers),
        )
        for name, times in holders.items()
    }
    counts = {name: workload.fleet.get(name, 1) for name in holders}
    per_token_s = {name: 1 / _PAPER_START[name] if name in _PAPER_START else 0.0 for name in holders}
    if not all(per_token_s.values()):
        per_token_s = {name: _rough_token_time_s(times, workload) for name, times in holders.items()}
    weight = sum(counts[name] * typical[name] for name in holders)
    for _ in range(_ROUNDS):
        if weight <= 0:
            break
        fleet_s = sum(per_token_s[name] * counts[name] * typical[name] for name in holders) / weight
        per_token_s = {
            name: 1
            / (_throughput(times, typical[name], per_token_s[name], fleet_s, workload, num_layers) * typical[name])
            for name, times in holders.items()
        }
    fleet_s = sum(per_token_s[name] * counts[name] * typical[name] for name in holders) / weight if weight else 0.0
    return {
        name: tuple(
            _throughput(times, layers, per_token_s[name], fleet_s, workload, num_layers)
            for layers in range(1, len(times.kv_capacity_token_layers) + 1)
        )
        if name in holders
        else ()
        for name, times in types.items()
    }


def kv_room_token_layers(memory_bytes: float, weight_bytes: float, kv_bytes_per_token_layer: float) -> float:
    """KV room in tokens x layers that is left beside the weights; 0 if the weights alone do not fit."""
    return max(0.0, (memory_bytes - weight_bytes) / kv_bytes_per_token_layer)


def kv_rooms(
    memory_bytes: float, model: ModelSpec, kv_bytes_per_token_layer: float, least_tokens: float
) -> tuple[float, ...]:
    """KV room in tokens x layers for every number of layers (index j-1) that leaves each `least_tokens` of it."""
    rooms: list[float] = []
    for layers in range(1, model.num_layers + 1):
        kv = kv_room_token_layers(memory_bytes, layers * model.layer_bytes, kv_bytes_per_token_layer)
        if kv < least_tokens * layers:
            break
        rooms.append(kv)
    return tuple(rooms)


def profiles_from_measurements(
    measured: Mapping[NodeId, NodeMeasurement],
    model: ModelSpec,
    kv_bytes_per_token_layer: float,
    workload: WorkloadSpec,
) -> dict[NodeId, NodeProfile]:
    """A profile per measured node; each node is a type of its own, since equal machines measure unequal.

    A node keeps room for `workload.min_kv_tokens` (at least one) in every layer it holds; what remains decides
    `max_layers`, which is 0 for a node that cannot hold a single layer.
    """
    least = max(1.0, workload.min_kv_tokens)
    rooms = {
        node: kv_rooms(found.memory_bytes, model, kv_bytes_per_token_layer, least) for node, found in measured.items()
    }
    times = {
        str(node): TypeTimes(found.prompt_layer_time_s, found.decode_layer_time_s, rooms[node])
        for node, found in measured.items()
    }
    throughput = derive_throughput(times, workload, model.num_layers)
    return {
        node: NodeProfile(
            type=found.type,
            memory_bytes=found.memory_bytes,
            max_layers=len(rooms[node]),
            throughput_tokens_per_s=throughput[str(node)],
            kv_capacity_token_layers=rooms[node],
            prompt_layer_time_s=found.prompt_layer_time_s,
            decode_layer_time_s=found.decode_layer_time_s,
        )
        for node, found in measured.items()
    }


def _rough_token_time_s(times: TypeTimes, workload: WorkloadSpec) -> float:
    mean_in, mean_out = workload.mean_input_tokens, workload.mean_output_tokens
    busy_s = layer_time_s(times.prompt_layer_time_s, mean_in) + layer_time_s(times.decode_layer_time_s, mean_out)
    return max(busy_s, 1e-9) / (mean_in + mean_out)


def _throughput(
    times: TypeTimes, layers: int, per_token_s: float, fleet_s: float, workload: WorkloadSpec, num_layers: int
) -> float:
    """T(layers), given the seconds per token and layer of this type and of the fleet."""
    mean_in, mean_out = workload.mean_input_tokens, workload.mean_output_tokens
    own_s = layers * per_token_s
    share = own_s / ((num_layers - layers) * fleet_s + own_s)
    kept_tokens = int(workload.kv_fraction * times.kv_capacity_token_layers[layers - 1] / layers)
    sequences = kept_tokens / (mean_in + mean_out) * share
    prompts = sequences / mean_out
    decodes = float(round(sequences))
    prompt_tokens = float(round(prompts * mean_in))
    if prompts > 1:
        prompts, prompt_tokens, decodes = 1.0, mean_in, mean_out
    elif decodes < 1 or prompt_tokens < 1:
        # Too little KV for the formula's whole numbers: one sequence at a time, which is slow but not impossible.
        decodes = max(sequences, 1.0)
        prompts = decodes / mean_out
        prompt_tokens = prompts * mean_in
    prompt_s = layer_time_s(times.prompt_layer_time_s, int(prompt_tokens / prompts))
    decode_s = layer_time_s(times.decode_layer_time_s, decodes) / prompts
    return (prompt_tokens + decodes) / prompts / (layers * max(prompt_s + decode_s, 1e-12))
