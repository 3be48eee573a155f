"""Petals' rule: a node that joins takes as many layers as fit, where the least served layer is served worst.

After all have joined, a node moves if the least served layer gains from it; rounds end when none does. The order of
joining is drawn from the seed. Borzunov et al., "Petals" (arXiv 2209.01188), section 3.2. Knows nothing of links.
"""

from random import Random

from helixd.layers import LayerRange
from helixd.plan.baselines.layout import Layout, throughput
from helixd.plan.cluster.spec import NodeSpec
from helixd.plan.holding import Holding
from helixd.plan.plan import Infeasible

_ROUNDS = 10
# A move must gain as much, so that nodes do not move for ever.
_GAIN = 1e-3


def place(holding: Holding, seed: int, time_limit_s: float) -> Layout:
    """One greedy placement. Raises Infeasible if a layer stays without a node."""
    order = list(holding.usable())
    Random(seed).shuffle(order)  # noqa: S311
    served = [0.0] * holding.num_layers
    held: dict[str, LayerRange] = {}
    for node in order:
        _take(holding, node, served, held)
    for _ in range(_ROUNDS):
        moved = False
        for node in order:
            before, was = min(served), held.pop(node.id, None)
            if was is None:
                continue
            _add(holding, node, was, served, -1)
            _take(holding, node, served, held)
            if min(served) <= before * (1 + _GAIN):
                now = held.pop(node.id)
                _add(holding, node, now, served, -1)
                held[node.id] = was
                _add(holding, node, was, served, 1)
            else:
                moved = moved or held[node.id] != was
        if not moved:
            break
    if min(served) <= 0:
        raise Infeasible(f"layer {served.index(min(served))} is left without a node")
    return Layout({node.id: held[node.id] for node in holding.spec.nodes if node.id in held})


def _take(holding: Holding, node: NodeSpec, served: list[float], held: dict[str, LayerRange]) -> None:
    # As many layers as fit, which are fewer where the embedding or the head comes with them.
    longest = {span.start: span for span in holding.options(node.id)}
    if not longest:
        return
    best = min(longest.values(), key=lambda span: (sorted(served[span.start : span.end]), span.start))
    held[node.id] = best
    _add(holding, node, best, served, 1)


def _add(holding: Holding, node: NodeSpec, span: LayerRange, served: list[float], sign: int) -> None:
    rate = sign * throughput(holding, node, len(span))
    for layer in span.layers():
        served[layer] += rate
        if abs(served[layer]) < 1e-9:
            served[layer] = 0.0
