"""How many tokens/s a placement serves, which is not its max flow: depth, KV room and batches count too.

A fixed point. Requests in flight are what KV room keeps. A decode step of one sequence passes every stage: it waits
for the step that runs there, then is part of one with the decodes that came meanwhile and a chunk of prompt for the
share of time that prompts need; and it crosses the links between, behind other messages. Requests in flight = rate x
time in flight; the largest rate that satisfies this, and that no node and no link is overrun by, is the prediction.

T(j) is not a limit here: it is what a node carries at the batches its KV room gives at one assumed load (see
`helixd.plan.cluster.profile`), and nodes do run faster where batches are larger. Links and NICs are limits.

Rules of serving come in as `Rules`. The weights of bunching and of the tightest node were chosen on some thirty
placements of each published cluster: the figure ranks others as the simulator does (rank correlation 0.9 and more, see
scripts/bench_predict.py) and scatters by 12 % about it; chains near their max flow fall most short of theirs. It is
rougher for the paper's rules: there it misplaces the published Helix plans of single24 and heterogeneous42.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from helixd.ids import NodeId
from helixd.layers import LayerRange
from helixd.plan.cluster.curve import Curve
from helixd.plan.cluster.spec import COORDINATOR, NodeSpec
from helixd.plan.graph.flow import Flow
from helixd.plan.holding import Holding

_BISECTIONS = 24
_PRECISE = 1e-5
# A link or node is overrun a little before its whole time is taken.
_FULL = 0.999
_KEPT_DIGITS = 6
# Requests in flight are longer than the mean request, for long ones stay long; how much depends on how lengths spread.
_LONGER = 1.2
# Where routes can bend around a full node, how near the KV room comes to that of all nodes of the tightest layer.
_BENT = 0.5
# Hops of less than this share of a node's flow are no way around it, where there are others.
_A_WAY = 0.02
# Batches that nothing splits merge where one waits for another, and leave stages idle: so much longer is a round for
# each stage of a chain. Where half of what leaves a node goes elsewhere there is next to nothing of it.
_MERGED, _SPLIT = 0.03, 8


@dataclass(frozen=True, slots=True)
class Rules:
    """How nodes serve. `chunk_tokens`: prompt tokens of one step (infinite: whole prompts). `max_batch`: decodes of
    one step. `kv_mark`: the share of KV room that admission fills. `convoy`: prompts are trucks that no decode behind
    them overtakes, not even at the next stage.
    """

    chunk_tokens: float = 128.0
    max_batch: float = 512.0
    kv_mark: float = 0.95
    convoy: bool = False


HELIXD = Rules()
# The published artifact: first come, first served, prompts whole. See its description in the simulator.
PAPER = Rules(chunk_tokens=math.inf, max_batch=math.inf, kv_mark=0.85, convoy=True)


@dataclass(frozen=True, slots=True)
class Prediction:
    """`round_s` is the time of one decode step at that rate, `unloaded_round_s` that of a lone sequence."""

    decode_tokens_per_s: float
    in_flight: float
    round_s: float
    unloaded_round_s: float


@dataclass(frozen=True, slots=True)
class _Visit:
    """What equal nodes see per decode token of the cluster: `share` of them each, `layers` used per token.

    `bunched`: how far tokens arrive as they left the stage before, in one batch: 1 where all that leaves one node
    goes on to this one, little where batches are split over many. `count` nodes are like this.
    """

    decode: Curve
    prompt: Curve
    share: float
    layers: float
    bunched: float
    count: int


@dataclass(frozen=True, slots=True)
class _Hop:
    """Links that are equally used: `share` of decode tokens, `latency_s`, seconds to send one token. `count` links."""

    share: float
    latency_s: float
    token_s: float
    count: int


def _last_below_zero(rising: Callable[[float], float], high: float) -> float:
    """The largest value in `[0, high]`, nearly, at which a function that rises from below 0 is not above it yet.

    False position, which is bisection where the function is infinite, with the Illinois rule: an end that stays twice
    counts half.
    """
    low, at_low, at_high = 0.0, -1.0, math.inf
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2 if math.isinf(at_high) else low - at_low * (high - low) / (at_high - at_low)
        value = rising(middle)
        if value <= 0:
            if not math.isinf(at_high):
                at_high /= 2
            low, at_low = middle, value
        else:
            at_low /= 2
            high, at_high = middle, value
        if high - low <= _PRECISE * high or -_PRECISE <= value <= 0:
            break
    return low


def stages(flow: Flow) -> float:
    """Nodes that a token crosses, weighted by flow."""
    return sum(flow.through.values()) / flow.value if flow.value > 0 else 0.0


def predict(
    holding: Holding, placement: Mapping[NodeId, LayerRange], flow: Flow, rules: Rules = HELIXD
) -> Prediction | None:
    """The throughput of a placement with a max flow of it; None if layer times are not known or nothing flows."""
    spec = holding.spec
    if flow.value <= 0:
        return None
    used = _layers_used(placement, flow)
    nodes = [node for node in spec.nodes if node.id in used]
    if any(not node.profile.prompt_layer_time_s or not node.profile.decode_layer_time_s for node in nodes):
        return None
    model = _Model(holding, flow, _visits(nodes, used, flow), rules)
    in_flight = max(1.0, _requests_kept(holding, placement, flow, used) * rules.kv_mark)
    mean_out = spec.workload.mean_output_tokens

    def too_many(rate: float) -> float:
        """By how much more requests than there may be are in flight at that rate, as a share; below 0 there is room."""
        held_s = model.times(rate)
        return math.inf if held_s is None else rate / mean_out * (held_s[1] + mean_out * held_s[0]) / in_flight - 1

    low = _last_below_zero(too_many, model.links_carry())
    loaded, alone = model.times(low), model.times(0.0)
    return Prediction(low, in_flight, loaded[0] if loaded else math.inf, alone[0] if alone else math.inf)


class _Model:
    """Times of a decode step and of a prompt at a given rate of decode tokens."""

    def __init__(self, holding: Holding, flow: Flow, visits: list[_Visit], rules: Rules) -> None:
        spec = holding.spec
        workload = spec.workload
        self._spec = spec
        self._flow = flow
        self._visits = visits
        self._rules = rules
        self._hops = _hops(holding, flow)
        self._out = workload.mean_output_tokens
        self._chunk = min(rules.chunk_tokens, workload.mean_input_tokens)
        self._chunks = workload.mean_input_tokens / self._chunk
        # Prompt chunks per decode token.
        self._per_decode = self._chunks / self._out
        unsplit = min((visit.bunched for visit in visits), default=0.0)
        self._merged = _MERGED * sum(visit.share * visit.count for visit in visits) * unsplit**_SPLIT

    def links_carry(self) -> float:
        """The rate at which a link or a NIC is full."""
        per_decode = 1 + self._spec.workload.mean_input_tokens / self._out
        most = self._flow.value
        for hop in self._hops:
            if hop.token_s > 0:
                most = min(most, _FULL / (hop.token_s * hop.share * per_decode))
        size = self._spec.model.activation_bytes
        for node in self._spec.nodes:
            through = self._flow.through.get(node.id, 0.0) / self._flow.value
            for nic in (node.nic_in_bytes_per_s, node.nic_out_bytes_per_s):
                if nic is not None and through > 0:
                    most = min(most, nic / (size * through * per_decode))
        return most

    def times(self, rate: float) -> tuple[float, float] | None:
        """Seconds of a decode step and of a prompt; None if a node or a link is overrun."""
        hops = self._hop_times(rate)
        if hops is None:
            return None
        round_s, prompt_s = hops
        slowest_s, convoy_s = 0.0, 0.0
        for visit in self._visits:
            found = self._visit(visit, rate)
            if found is None:
                return None
            decode_s, chunk_visit_s, step_s, behind_s = found
            weight = visit.share * visit.count
            round_s += weight * decode_s
            prompt_s += weight * chunk_visit_s
            convoy_s += weight * behind_s
            slowest_s = max(slowest_s, step_s)
        if self._rules.convoy:
            round_s = self._convoy_s(round_s, convoy_s, rate)
        elif rate > 0:
            # A lone sequence has nothing to merge with.
            round_s *= 1 + self._merged
        # Chunks follow one another through the pipeline at the pace of its slowest stage.
        return round_s, prompt_s + (self._chunks - 1) * slowest_s

    def _convoy_s(self, round_s: float, behind_s: float, rate: float) -> float:
        """A round some of which is spent behind prompts: the more, the more prompts set out in a round."""
        total = round_s
        for _ in range(4):
            total = round_s + (1 - math.exp(-rate / self._out * total)) * behind_s
        return total

    def _visit(self, visit: _Visit, rate: float) -> tuple[float, float, float, float] | None:
        """Seconds that a decode, a chunk of prompt, a step, and waiting behind a prompt take; None if overrun."""
        decodes_per_s = rate * visit.share
        chunk_s = visit.layers * visit.prompt.at(self._chunk)
        chunks_per_s = decodes_per_s * self._per_decode
        prompts = chunks_per_s * chunk_s
        if prompts >= _FULL:
            return None
        found = _step(visit, decodes_per_s, prompts)
        if found is None or found[0] > self._rules.max_batch:
            return None
        batch, decodes_s = found
        busy = min(1.0, decodes_per_s * decodes_s / batch + prompts)
        if self._rules.convoy:
            # All that is behind one prompt goes on as one batch, unless it is split.
            apart = 0.9 * visit.bunched
            bunch = max(batch, batch ** (1 - apart) * (self._out * visit.share) ** apart)
            decodes_s = visit.layers * visit.decode.at(bunch)
            return decodes_s, decodes_s + chunk_s, decodes_s, (0.3 + 0.8 * visit.bunched) * chunk_s
        step_s = decodes_s / (1 - prompts)
        with_chunk = min(1.0, chunks_per_s * step_s)
        if chunks_per_s * step_s >= _FULL:
            return None
        mean_s = decodes_s + with_chunk * chunk_s
        square = (1 - with_chunk) * decodes_s**2 + with_chunk * (decodes_s + chunk_s) ** 2
        # What is left of the running step; what comes in one frame from one node finds this one done with the last.
        wait_s = busy * square / (2 * mean_s) * (1 - visit.bunched)
        queue_s = with_chunk / (1 - with_chunk) * mean_s / 2
        return mean_s + wait_s, mean_s + wait_s + queue_s, mean_s, 0.0

    def _hop_times(self, rate: float) -> tuple[float, float] | None:
        """Seconds on links of one decode token and of one chunk, over all hops."""
        decode_s = chunk_s = 0.0
        for hop in self._hops:
            decodes_per_s = rate * hop.share
            chunks_per_s = decodes_per_s * self._per_decode
            chunk_send_s = self._chunk * hop.token_s
            load = decodes_per_s * hop.token_s + chunks_per_s * chunk_send_s
            if load >= 1:
                return None
            # A message waits for those before it (one queue, Poisson arrivals).
            wait_s = (decodes_per_s * hop.token_s**2 + chunks_per_s * chunk_send_s**2) / (2 * (1 - load))
            weight = hop.share * hop.count
            decode_s += weight * (hop.latency_s + hop.token_s + wait_s)
            chunk_s += weight * (hop.latency_s + chunk_send_s + wait_s)
        return decode_s, chunk_s


def _step(visit: _Visit, decodes_per_s: float, prompts: float) -> tuple[float, float] | None:
    """The batch and the seconds of the decodes of one step, when steps follow one another; None if they grow forever.

    A step takes the decodes that came during the last one, in the share of its time that prompts leave.
    """
    step_s = visit.layers * visit.decode.at(1.0) / (1 - prompts)
    batch, decodes_s = 1.0, step_s * (1 - prompts)
    for _ in range(60):
        batch = max(1.0, decodes_per_s * step_s)
        decodes_s = visit.layers * visit.decode.at(batch)
        next_s = decodes_s / (1 - prompts)
        if next_s > 1e3:
            return None
        if abs(next_s - step_s) <= 1e-4 * step_s:
            break
        step_s = next_s
    else:
        return None
    return batch, max(decodes_s, 1e-9)


def _layers_used(placement: Mapping[NodeId, LayerRange], flow: Flow) -> dict[NodeId, float]:
    """Layers that a token which passes a node uses there, on average; fewer than held where some enter late."""
    used: dict[NodeId, float] = {}
    for (src, dst), carried in flow.edges.items():
        if dst != COORDINATOR:
            entry = 0 if src == COORDINATOR else placement[src].end
            used[dst] = used.get(dst, 0.0) + carried * (placement[dst].end - entry)
    return {node: used[node] / through for node, through in flow.through.items() if used.get(node)}


def _visits(nodes: list[NodeSpec], used: Mapping[NodeId, float], flow: Flow) -> list[_Visit]:
    """The nodes in use, equal ones together: it is their number that makes a prediction slow."""
    leaving: dict[NodeId, float] = {}
    for (src, _), carried in flow.edges.items():
        leaving[src] = leaving.get(src, 0.0) + carried
    bunched: dict[NodeId, float] = {}
    for (src, dst), carried in flow.edges.items():
        if dst != COORDINATOR:
            bunched[dst] = bunched.get(dst, 0.0) + carried / leaving[src] * carried / flow.through[dst]
    curves: dict[int, tuple[Curve, Curve]] = {}
    groups: dict[tuple[int, float, float, float], int] = {}
    for node in nodes:
        profile = node.profile
        if id(profile) not in curves:
            curves[id(profile)] = (
                Curve(profile.decode_layer_time_s, from_one=True), Curve(profile.prompt_layer_time_s)
            )  # fmt: skip
        facts = (flow.through[node.id] / flow.value, used[node.id], min(1.0, bunched[node.id]))
        share, layers, apart = map(_near, facts)
        key = (id(profile), share, layers, apart)
        groups[key] = groups.get(key, 0) + 1
    return [
        _Visit(*curves[profile_id], share, layers, apart, count)
        for (profile_id, share, layers, apart), count in groups.items()
    ]


def _hops(holding: Holding, flow: Flow) -> list[_Hop]:
    links, spec = holding.links, holding.spec
    groups: dict[tuple[float, float, float], int] = {}
    for edge, carried in flow.edges.items():
        link = links[edge]
        size = spec.model.token_bytes if COORDINATOR in edge else spec.model.activation_bytes
        key = (_near(carried / flow.value), link.latency_s, size / link.bandwidth_bytes_per_s)
        groups[key] = groups.get(key, 0) + 1
    return [_Hop(*key, count) for key, count in groups.items()]


def _near(value: float) -> float:
    """A value without the last digits, in which equal nodes differ; small values keep their size."""
    return float(f"{value:.{_KEPT_DIGITS}g}")


def _requests_kept(
    holding: Holding, placement: Mapping[NodeId, LayerRange], flow: Flow, used: Mapping[NodeId, float]
) -> float:
    """Requests whose KV fits at once.

    More than the tightest node has room for at its share of the flow, since routes bend around a full node and enter
    it later; less than the tightest layer has room for if all did, since they bend only so far.
    """
    workload = holding.spec.workload
    tokens = _LONGER * (workload.mean_input_tokens + workload.mean_output_tokens)
    entries: dict[NodeId, list[tuple[int, float]]] = {node: [] for node in used}
    for (src, dst), carried in flow.edges.items():
        if dst in entries:
            entries[dst].append((0 if src == COORDINATOR else placement[src].end, carried / flow.through[dst]))
    room = [0.0] * holding.num_layers
    tightest_node = math.inf
    for node, ways in entries.items():
        held = placement[node]
        kept = max(0.0, holding.kv_token_layers(node, held))
        tightest_node = min(tightest_node, kept / used[node] * flow.value / flow.through[node])
        a_way = min(_A_WAY, max(share for _, share in ways))
        least = held.end - max(entry for entry, share in ways if share >= a_way)
        for entry, share in ways:
            for layer in range(entry, held.end):
                room[layer] += kept / least * share
    tightest_layer = min(room)
    return float(tightest_layer**_BENT * min(tightest_layer, tightest_node) ** (1 - _BENT)) / tokens
