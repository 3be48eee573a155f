"""Placement by moving one node at a time, where every layer wants the same flow and links are not looked at.

Where links do not bind, the max flow of a placement is the least over the layers of the sum of T over the nodes that
hold them. So the search fills `deficit = sum over layers of max(0, flow - cover)`; it copes with anything a node may
be asked for (pins, T(j) that is not monotone, embedding and head), at the price of being a search.
"""

from collections.abc import Mapping
from random import Random

import numpy as np
from numpy.typing import NDArray

from helixd.ids import NodeId
from helixd.layers import LayerRange
from helixd.plan.graph.flow import node_capacity
from helixd.plan.holding import Holding

Placement = dict[NodeId, LayerRange]


def least_cover(holding: Holding, placement: Mapping[NodeId, LayerRange]) -> float:
    """The flow of a placement where links do not bind: what its least covered layer has."""
    cover = [0.0] * holding.num_layers
    for node, held in placement.items():
        rate = node_capacity(holding.spec, holding.node(node), len(held))
        for layer in held.layers():
            cover[layer] += rate
    return min(cover)


class CoverSearch:
    """Gibbs moves over the ranges of the free nodes of one cluster; pinned nodes stay. Same seed, same result."""

    def __init__(self, holding: Holding, *, seed: int = 0) -> None:
        self._holding = holding
        self._random = Random(seed)  # noqa: S311
        spec = holding.spec
        nodes = {node.id: node for node in holding.usable()}
        self._options = {node: options for node in nodes if (options := holding.options(node))}
        # Like nodes have the same tuple of options and share its tables.
        every = {id(options): options for options in self._options.values()}
        starts = {key: np.array([r.start for r in options]) for key, options in every.items()}
        ends = {key: np.array([r.end for r in options]) for key, options in every.items()}
        self._starts = {n: starts[id(options)] for n, options in self._options.items()}
        self._ends = {n: ends[id(options)] for n, options in self._options.items()}
        self._rates: dict[NodeId, NDArray[np.float64]] = {}
        for n, options in self._options.items():
            by_length = np.array([0.0, *(node_capacity(spec, nodes[n], j) for j in range(1, len(options[-1]) + 1))])
            self._rates[n] = by_length[self._ends[n] - self._starts[n]]
        # The rates there are, ascending, and for each option which of them is its own.
        self._levels = {n: np.unique(rates, return_inverse=True) for n, rates in self._rates.items()}
        self._choice: dict[NodeId, int | None] = {}
        self._cover: NDArray[np.float64] = np.zeros(holding.num_layers)
        self._prices: dict[NodeId, NDArray[np.float64]] = {}
        self._before: dict[NodeId, int] = {}

    def run(
        self,
        target: float,
        *,
        sweeps: int,
        start: Mapping[NodeId, LayerRange] | None = None,
        price: float = 0.0,
        eager: bool = True,
    ) -> Placement:
        """The best placement met on the way to a cover of `target` tokens/s.

        `eager`: raise the target when it is reached, else stop there. `price`: cover that a move has to bring for each
        layer that the node does not hold at the `start`, as a share of the target.
        """
        self._begin(start or {})
        self._prices = self._load_prices(start or {}, price * target) if price else {}
        order = sorted(self._options)
        best_flow, best = float(self._cover.min()), self._placement()
        for sweep in range(sweeps):
            warmth = 0.3 * (1 - sweep / sweeps) if sweep % 3 and not price else 0.0
            self._random.shuffle(order)
            for node in order:
                self._move(node, target, warmth)
                flow = float(self._cover.min())
                if flow > best_flow * (1 + 1e-9):
                    best_flow, best = flow, self._placement()
                    if not eager and flow >= target * (1 - 1e-9):
                        return best
                    target = max(target, flow * 1.02)
        return best

    def _load_prices(self, start: Mapping[NodeId, LayerRange], price: float) -> dict[NodeId, NDArray[np.float64]]:
        """For each option of each node what it costs in cover to load the layers that it does not hold."""
        prices: dict[NodeId, NDArray[np.float64]] = {}
        for node in self._options:
            starts, ends = self._starts[node], self._ends[node]
            kept = np.zeros(len(starts), dtype=np.int64)
            if (before := start.get(node)) is not None:
                kept = np.maximum(0, np.minimum(ends, before.end) - np.maximum(starts, before.start))
            prices[node] = price * (ends - starts - kept)
        return prices

    def _begin(self, start: Mapping[NodeId, LayerRange]) -> None:
        self._cover = np.zeros(self._holding.num_layers)
        for node, options in self._options.items():
            held = start.get(node)
            if self._holding.must_hold(node) and held is None:
                held = options[0]
            self._choice[node] = None
            self._before.pop(node, None)
            if held is None:
                continue
            same = np.flatnonzero((self._starts[node] == held.start) & (self._ends[node] == held.end))
            if len(same):
                self._before[node] = int(same[0])
                self._put(node, self._before[node])

    def _placement(self) -> Placement:
        return {
            node: self._options[node][choice] for node, choice in sorted(self._choice.items()) if choice is not None
        }

    def _put(self, node: NodeId, choice: int | None) -> None:
        self._choice[node] = choice
        if choice is not None:
            self._cover[self._starts[node][choice] : self._ends[node][choice]] += self._rates[node][choice]

    def _take(self, node: NodeId) -> None:
        choice = self._choice[node]
        if choice is not None:
            held = slice(self._starts[node][choice], self._ends[node][choice])
            self._cover[held] -= self._rates[node][choice]
            # Keeps a layer that nobody holds at exactly nothing.
            self._cover[np.abs(self._cover) < 1e-9] = 0.0

    def _move(self, node: NodeId, target: float, warmth: float) -> None:
        self._take(node)
        deficit = np.maximum(0.0, target - self._cover)
        levels, own = self._levels[node]
        filled = np.zeros((len(levels), len(deficit) + 1))
        np.minimum(deficit, levels[:, None]).cumsum(axis=1, out=filled[:, 1:])
        gain: NDArray[np.float64] = filled[own, self._ends[node]] - filled[own, self._starts[node]]
        if node in self._prices:
            gain = gain - self._prices[node]
        if warmth > 0:
            gain = gain + warmth * gain.max() * np.array([self._random.random() for _ in range(len(gain))]) ** 4
        top = gain.max()
        best = np.flatnonzero(gain >= top - 1e-12 * abs(top))
        choice = int(best[self._random.randrange(len(best))])
        old = self._before.get(node) if node in self._prices else None
        # Where loading has a price, a node that is no better elsewhere stays, needed or not.
        if old is not None and (gain[choice] <= 0 or gain[old] >= top - 1e-9 * target):
            self._put(node, old)
            return
        if gain[choice] <= 0 and not self._holding.must_hold(node):
            self._put(node, None)
        else:
            self._put(node, choice)
