"""How many tokens/s a placement serves, which is not its max flow: depth and KV room count too.

A fixed point. Requests in flight are what the KV room of the tightest layer keeps. A round (one decode step of one
sequence) takes, at every stage, a batch of the decodes that arrive meanwhile plus a chunk of prompt in the share of
time prompts need, and the links between. Requests in flight = rate x time in flight; the rate that satisfies this,
within the max flow's share of decode tokens, is the prediction. Assumes whole-range stages, decode first, chunked
prefill: what helixd's engine does.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from helixd.ids import NodeId
from helixd.layers import LayerRange
from helixd.plan.flow import Flow
from helixd.plan.holding import Holding
from helixd.plan.profile import layer_time_s
from helixd.plan.spec import COORDINATOR, ClusterSpec, NodeSpec

_CHUNK_TOKENS = 128.0
# The ledger admits up to this share of the KV room; sequences reserve what they are expected to grow to.
_KV_MARK = 0.85
_BISECTIONS = 40


@dataclass(frozen=True, slots=True)
class Prediction:
    """`round_s` is the time of one decode step at that rate, `unloaded_round_s` that of a lone sequence."""

    decode_tokens_per_s: float
    in_flight: float
    round_s: float
    unloaded_round_s: float


@dataclass(frozen=True, slots=True)
class _Visit:
    """What one node sees per decode token of the cluster: its share of them, and layers used per token."""

    node: NodeSpec
    share: float
    layers: float


def stages(flow: Flow) -> float:
    """Nodes that a token crosses, weighted by flow."""
    return sum(flow.through.values()) / flow.value if flow.value > 0 else 0.0


def predict(holding: Holding, placement: Mapping[NodeId, LayerRange], flow: Flow) -> Prediction | None:
    """The throughput of a placement with a max flow of it; None if layer times are not known or nothing flows."""
    spec = holding.spec
    if flow.value <= 0:
        return None
    visits = _visits(spec, placement, flow)
    if any(not v.node.profile.prompt_layer_time_s or not v.node.profile.decode_layer_time_s for v in visits):
        return None
    workload = spec.workload
    mean_in, mean_out = workload.mean_input_tokens, workload.mean_output_tokens
    in_flight = max(1.0, _kv_tokens(holding, placement) * _KV_MARK / (mean_in + mean_out))
    network_s = _network_s(spec, flow, tokens=1.0)
    prompt_network_s = _network_s(spec, flow, tokens=min(mean_in, _CHUNK_TOKENS))

    def held_for_s(rate: float) -> tuple[float, float] | None:
        """Round time and time in flight of one request at `rate` decode tokens/s; None if a node is overrun."""
        round_s, prompt_s = network_s, prompt_network_s
        for visit in visits:
            times = _node_times(visit, rate, mean_in, mean_out)
            if times is None:
                return None
            round_s += visit.share * times[0]
            prompt_s += visit.share * times[1]
        return round_s, prompt_s + mean_out * round_s

    low, high = 0.0, flow.value * mean_out / (mean_in + mean_out)
    for _ in range(_BISECTIONS):
        rate = (low + high) / 2
        times = held_for_s(rate)
        if times is not None and rate / mean_out * times[1] <= in_flight:
            low = rate
        else:
            high = rate
    loaded = held_for_s(low)
    alone = held_for_s(0.0)
    return Prediction(low, in_flight, loaded[0] if loaded else float("inf"), alone[0] if alone else float("inf"))


def _visits(spec: ClusterSpec, placement: Mapping[NodeId, LayerRange], flow: Flow) -> list[_Visit]:
    used: dict[NodeId, float] = {}
    for (src, dst), carried in flow.edges.items():
        if dst != COORDINATOR:
            entry = 0 if src == COORDINATOR else placement[src].end
            used[dst] = used.get(dst, 0.0) + carried * (placement[dst].end - entry)
    return [
        _Visit(node, flow.through[node.id] / flow.value, used.get(node.id, 0.0) / flow.through[node.id])
        for node in spec.nodes
        if flow.through.get(node.id, 0.0) > 0
    ]


def _node_times(visit: _Visit, rate: float, mean_in: float, mean_out: float) -> tuple[float, float] | None:
    """Seconds that a decode step, and a whole prompt, spend at a node; None if it cannot keep up.

    Per second the node has `rate * share` decodes and mean_in / mean_out times as many prompt tokens. A step runs all
    decodes that came in the last one, then a chunk of prompt if there is any.
    """
    profile, layers = visit.node.profile, visit.layers
    decodes_per_s = rate * visit.share
    chunk = min(_CHUNK_TOKENS, mean_in)
    chunk_s = layers * layer_time_s(profile.prompt_layer_time_s, chunk)
    chunks_per_s = decodes_per_s * mean_in / mean_out / chunk
    prompt_load = chunks_per_s * chunk_s
    if prompt_load >= 1:
        return None
    step_s = layers * layer_time_s(profile.decode_layer_time_s, 1.0)
    for _ in range(30):
        batch = max(1.0, decodes_per_s * step_s)
        decode_s = layers * max(layer_time_s(profile.decode_layer_time_s, batch), 1e-9)
        new_s = decode_s / (1 - prompt_load)
        if new_s > 1e3:
            return None
        if abs(new_s - step_s) <= 1e-4 * step_s:
            break
        step_s = new_s
    else:
        return None
    busy = min(1.0, prompt_load + decodes_per_s * decode_s / batch)
    # A decode arrives somewhere in a running step and waits for its end: half a step when the node is always busy.
    decode_visit_s = decode_s + busy * (step_s / 2 + prompt_load * chunk_s / 2)
    prompt_visit_s = mean_in / chunk * chunk_s / max(1e-3, 1 - min(0.99, decodes_per_s * decode_s / batch))
    return decode_visit_s, prompt_visit_s


def _network_s(spec: ClusterSpec, flow: Flow, tokens: float) -> float:
    """Seconds on links for `tokens` tokens of one sequence, over all hops, weighted by flow."""
    links = {(link.src, link.dst): link for link in spec.links}
    total = 0.0
    for edge, carried in flow.edges.items():
        link = links[edge]
        size = spec.model.token_bytes if COORDINATOR in edge else spec.model.activation_bytes
        total += carried / flow.value * (link.latency_s + tokens * size / link.bandwidth_bytes_per_s)
    return total


def _kv_tokens(holding: Holding, placement: Mapping[NodeId, LayerRange]) -> float:
    """Tokens that can be kept at once: KV room at the layer where it is tightest."""
    room = [0.0] * holding.num_layers
    for node, held in placement.items():
        per_layer = max(0.0, holding.kv_token_layers(node, held)) / len(held)
        for layer in held.layers():
            room[layer] += per_layer
    return min(room)
