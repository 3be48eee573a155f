"""Stage covers of large clusters: stages of parallel lanes, made one by one at the prices of a linear program.

With many nodes to a stage there are too many possible stages to list (`helixd.plan.search.stages` lists them). Column
generation makes only those that pay: the linear program that covers the layers with the stages known so far prices
the nodes; a stage that is cheaper than what it covers is added, until there is none. Links are not looked at.
"""

from collections.abc import Callable, Sequence
from operator import le

import numpy as np
from numpy.typing import NDArray

from helixd.plan import milp
from helixd.plan.search.lanes import Lane, LaneStage, lanes_of
from helixd.plan.search.stages import Kind

_ROUNDS = 60
# Units that a stage's flow is counted in: some for each of its lanes.
_LEAST_UNITS, _MOST_UNITS, _UNITS_PER_LANE, _OVER = 60, 1500, 60, 6
_DEARER = 4
_NODES = 400
_SOLVE_S = 4.0
_PROBES = 10
_NEAR = 4e-3

Floats = NDArray[np.float64]


class _Menus:
    """For each number of layers the lanes that can be part of a stage of so many, as arrays padded to one width."""

    def __init__(self, kinds: Sequence[Kind], num_layers: int, length: int) -> None:
        longest = min(num_layers, length * max((kind.most[0][0] for kind in kinds), default=0))
        every = {layers: lanes_of(kinds, layers, length) for layers in range(1, longest + 1)}
        self.lanes = [lanes for lanes in every.values() if lanes and lanes[0].rate > 0]
        self.layers = np.array([layers for layers, lanes in every.items() if lanes and lanes[0].rate > 0])
        width = max((len(lanes) for lanes in self.lanes), default=0)
        self.rates: Floats = np.zeros((len(self.lanes), width))
        self.uses: Floats = np.zeros((len(self.lanes), width, len(kinds)))
        for m, lanes in enumerate(self.lanes):
            for i, lane in enumerate(lanes):
                self.rates[m, i] = lane.rate
                for kind in lane.kinds:
                    self.uses[m, i, kind] += 1


class StageColumns:
    """Column generation for one fleet. `length`: most nodes in a lane (1: all nodes of a stage hold the same).

    `min_width` 2: at least two lanes in each stage.
    """

    def __init__(
        self, kinds: Sequence[Kind], num_layers: int, *, length: int = 2, min_width: int = 1, seed: int = 0
    ) -> None:
        self._min_width = min_width
        self._room = np.array([len(kind.nodes) for kind in kinds], dtype=np.float64)
        self._rooms = [len(kind.nodes) for kind in kinds]
        self._num_layers = num_layers
        self._seed = seed
        self._menus = _Menus(kinds, num_layers, length)
        self._rates = [[lane.rate for lane in lanes] for lanes in self._menus.lanes]
        self._known: dict[LaneStage, float] = {}

    def best(
        self,
        low: float,
        high: float,
        *,
        first: float = 0.5,
        near: float = _NEAR,
        out_of_time: Callable[[], bool] = lambda: False,
    ) -> tuple[float, tuple[LaneStage, ...]] | None:
        """Stages of more than `low` tokens/s each that cover all layers, as near to `high` as few probes come.

        `first`: where between the two to look first. `near`: how much of `high` may be left in doubt.
        """
        found: tuple[float, tuple[LaneStage, ...]] | None = None
        for probe in range(_PROBES):
            if (probe and out_of_time()) or high - low < near * high:
                break
            middle = low + (high - low) * (first if probe == 0 else 0.5)
            stages = self.cover(middle)
            if stages is None:
                high = middle
            else:
                low = max(middle, min(stage.flow() for stage in stages))
                found = (low, stages)
        return found

    def cover(self, flow: float, *, fewest: bool = False) -> tuple[LaneStage, ...] | None:
        """Stages of at least `flow` tokens/s each that cover all layers; None if none are found.

        `fewest`: with as few stages as the columns made for that allow.
        """
        columns = self._generate(flow, fewest)
        if columns is None:
            return None
        program = self._program(columns, fewest=fewest, integer=True)
        solution = milp.solve(
            program,
            time_limit_s=_SOLVE_S,
            seed=self._seed,
            node_limit=_NODES,
            gap=0.02 if fewest else 1e-6,
            hasty=True,
        )
        if solution is None:
            return None
        return tuple(stage for stage, times in zip(columns, solution.values, strict=True) for _ in range(round(times)))

    def _generate(self, flow: float, fewest: bool) -> list[LaneStage] | None:
        """Columns with which the linear program is at its optimum; None if even that does not cover the layers."""
        wanted = flow * (1 - 1e-9)
        columns = [stage for stage, rate in self._known.items() if rate >= wanted]
        known = set(columns)
        for stage in self._cheapest(1 / self._room, wanted, None):
            self._keep(stage, columns, known)
        covered = 0.0
        for _ in range(_ROUNDS):
            solution = milp.solve(self._program(columns, fewest=False, integer=False), hasty=True)
            if solution is None:
                return None
            covered = -solution.cost
            prices = np.maximum(0.0, -np.array(solution.row_duals[: len(self._room)]))
            worth, stage_price = 1.0, 0.0
            if fewest and covered >= self._num_layers * (1 - 1e-9):
                solution = milp.solve(self._program(columns, fewest=True, integer=False), hasty=True)
                if solution is None:
                    return None
                prices = np.maximum(0.0, -np.array(solution.row_duals[: len(self._room)]))
                worth, stage_price = max(0.0, solution.row_duals[len(self._room)]), 1.0
            targets = self._menus.layers * worth - stage_price
            added = False
            for stage, target in zip(self._cheapest(prices + 1e-9, wanted, targets), targets, strict=True):
                if stage is not None and target > self._cost(stage, prices) + 1e-6 * stage.layers:
                    added |= self._keep(stage, columns, known)
            if not added:
                break
        return columns if covered >= self._num_layers * (1 - 1e-9) else None

    def _keep(self, stage: LaneStage | None, columns: list[LaneStage], known: set[LaneStage]) -> bool:
        if stage is None or stage in known:
            return False
        known.add(stage)
        columns.append(stage)
        self._known[stage] = stage.flow()
        return True

    def _cost(self, stage: LaneStage, prices: Floats) -> float:
        return sum(float(prices[kind]) for lane in stage.lanes for kind in lane.kinds)

    def _cheapest(self, prices: Floats, flow: float, worth: Floats | None) -> list[LaneStage | None]:
        """For each number of layers the cheapest stage found that carries `flow`, of no more nodes than there are.

        None where there is none, or where it surely costs more than `worth`.
        """
        menus = self._menus
        found: list[LaneStage | None] = [None] * len(menus.lanes)
        with np.errstate(divide="ignore", invalid="ignore"):
            per_rate = np.where(menus.rates > 0, menus.uses @ prices / menus.rates, np.inf)
        left = np.arange(len(found)) if worth is None else np.flatnonzero(flow * per_rate.min(axis=1) <= worth)
        grid = int(min(_MOST_UNITS, max(_LEAST_UNITS, _UNITS_PER_LANE * flow / max(menus.rates.max(), 1e-12))))
        # Of two lanes at least, none counts for all of the flow.
        most = grid if self._min_width < 2 else grid - _OVER - 1
        units = np.minimum(most, np.floor(menus.rates * grid / flow + 0.5)).astype(np.int64)
        dear = np.ones((len(found), len(self._room)))
        for attempt in range(_DEARER):
            if not len(left):
                break
            costs = np.einsum("mik,mk->mi", menus.uses[left], prices * dear[left])
            choice, least = least_costs(units[left], costs, grid + _OVER)
            if worth is not None and attempt == 0:
                # What pays only with more nodes than there are pays even less without.
                pays = least[:, grid] <= worth[left]
                left, choice = left[pays], choice[pays]
            again = []
            for m, picks in zip(left.tolist(), choice, strict=True):
                lanes, short = self._read(m, picks, units[m], grid, flow)
                if lanes is not None:
                    found[m] = _stage(int(menus.layers[m]), lanes)
                elif short is not None:
                    # More nodes of some kind than there are: that kind is made dearer.
                    dear[m] = np.where(short, dear[m] * 1.25, dear[m])
                    again.append(m)
            left = np.array(again, dtype=np.int64)
        for m in left.tolist():
            found[m] = self._greedy(m, menus.uses[m] @ prices, flow)
        return found

    def _read(
        self, m: int, picks: NDArray[np.int64], units: NDArray[np.int64], grid: int, flow: float
    ) -> tuple[list[Lane] | None, NDArray[np.bool_] | None]:
        """The lanes that the table `picks` stands for, or the kinds of which it takes too many.

        Rates are rounded to the grid: a little more than asked for may be what it takes.
        """
        lanes, room, rates = self._menus.lanes[m], self._rooms, self._rates[m]
        gains, picked = units.tolist(), picks.tolist()
        short: NDArray[np.bool_] | None = None
        before: list[int] = []
        for aim in range(grid, grid + _OVER + 1):
            chosen: list[int] = []
            at, carried = aim, 0.0
            while at > 0:
                i = picked[at]
                if gains[i] <= 0:
                    return None, short
                chosen.append(i)
                carried += rates[i]
                at -= gains[i]
            if carried >= flow and chosen != before:
                before = chosen
                used = [0] * len(room)
                for i in chosen:
                    for kind in lanes[i].kinds:
                        used[kind] += 1
                if all(map(le, used, room)):
                    return [lanes[i] for i in chosen], None
                if short is None:
                    short = np.array(used) > self._room
        return None, short

    def _greedy(self, m: int, costs: Floats, flow: float) -> LaneStage | None:
        """Lanes of most rate for their price while there are nodes for them; the last one the cheapest that does."""
        rates, uses = self._menus.rates[m], self._menus.uses[m]
        lanes: list[Lane] = []
        left, carried = self._room.copy(), 0.0
        while carried < flow or len(lanes) < self._min_width:
            fits = np.flatnonzero((uses <= left).all(axis=1) & (rates > 0))
            if not len(fits):
                return None
            enough = fits[rates[fits] >= flow - carried]
            i = int(enough[costs[enough].argmin()] if len(enough) else fits[(costs[fits] / rates[fits]).argmin()])
            left -= uses[i]
            carried += rates[i]
            lanes.append(self._menus.lanes[m][i])
        return _stage(int(self._menus.layers[m]), lanes)

    def _program(self, columns: Sequence[LaneStage], *, fewest: bool, integer: bool) -> milp.Program:
        program = milp.Program()
        using: list[dict[int, float]] = [{} for _ in self._room]
        for i, stage in enumerate(columns):
            program.column(1.0 if fewest else -float(stage.layers), integer=integer, upper=self._num_layers)
            for lane in stage.lanes:
                for kind in lane.kinds:
                    using[kind][i] = using[kind].get(i, 0.0) + 1.0
        for room, used in zip(self._room, using, strict=True):
            program.row(list(used), list(used.values()), upper=float(room))
        if fewest or integer:
            program.row(range(len(columns)), [stage.layers for stage in columns], lower=self._num_layers)
        if integer and not fewest:
            # Any cover will do.
            program.cost = [0.0] * len(columns)
        return program


def _stage(layers: int, lanes: Sequence[Lane]) -> LaneStage:
    return LaneStage(layers, tuple(sorted(lanes, key=lambda lane: (-lane.rate, lane.kinds, lane.layers))))


def least_costs(units: NDArray[np.int64], costs: Floats, top: int) -> tuple[NDArray[np.int64], Floats]:
    """For each row, and each number of units up to `top`, the item to take last of the cheapest that give as many, and
    what they cost.

    A covering knapsack with any number of each item, all rows at once.
    """
    rows, width = units.shape
    spent = np.where(units > 0, costs, np.inf)
    # Zeros in front: an item may give more units than are still wanted.
    pad = max(1, int(units.max(initial=1)))
    least = np.zeros((rows, pad + top + 1))
    flat = least.reshape(-1)
    rest = (np.arange(rows) * (pad + top + 1) + pad)[:, None] - units
    choice = np.zeros((top + 1, rows), dtype=np.int64)
    total = np.empty((rows, width))
    first = np.arange(rows) * width
    for at in range(1, top + 1):
        rest += 1
        flat.take(rest, out=total, mode="clip")
        total += spent
        pick = total.argmin(axis=1, out=choice[at])
        least[:, pad + at] = total.reshape(-1).take(pick + first)
    return choice.T, least[:, pad:]
