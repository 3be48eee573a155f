"""Candidate placements of a cluster, from every method that suits it, each judged by its true max flow.

Which candidate is best is the planner's decision; here is only what can be had. Budgets count moves and flows, in
proportion to `effort_s`, so that a seed gives the same candidates on any machine; the clock can only end it early.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from helixd.ids import NodeId
from helixd.layers import LayerRange
from helixd.plan.arrange import Arrangement
from helixd.plan.bounds import capacity_bound, pattern_bound
from helixd.plan.chains import pipelines
from helixd.plan.cover import CoverSearch, least_cover
from helixd.plan.exhaustive import best_of_all
from helixd.plan.flow import Flow, FlowModel
from helixd.plan.holding import Holding
from helixd.plan.lanes import best_lane_cover, lay_out_lanes
from helixd.plan.predict import Prediction, predict
from helixd.plan.repair import improve
from helixd.plan.stages import Kind, Stage, best_cover, cover, few_kinds, kinds_of, lay_out

# Clusters of up to so many nodes are searched more closely.
SMALL = 8

# Flows, as shares of the best cover, at which the fewest stages are looked for.
_FRONTIER = (0.97, 0.94, 0.9, 0.85, 0.8, 0.72, 0.64, 0.56, 0.48, 0.4, 0.32, 0.25)
# Shares at which stages are looked for that links, where they bind, may be able to feed.
_LINKED = (0.97, 0.94, 0.9, 0.86, 0.82, 0.78, 0.74, 0.66, 0.58, 0.5)
# Numbers of stages of several nodes that slow links between regions may need.
_WIDE = (2, 3, 4, 6)
# Per second of effort, with room to spare for the rest: annealing moves, flows and moves of the two local searches.
_MOVES_PER_S = 9_000
_FLOWS_PER_S = 300
_COVER_MOVES_PER_S = 4_000
_FIRST_MOVES = 8_000
_DEEPER = 3

Placement = dict[NodeId, LayerRange]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A valid placement that carries flow; `survives`: some pipeline is left whichever one node is lost."""

    placement: Placement
    flow: Flow
    prediction: Prediction | None
    survives: bool
    method: str


@dataclass(frozen=True, slots=True)
class _Structure:
    """Stages without an order: what links have to be found for."""

    placement: Placement
    goal: float


class Search:
    """One search of one cluster. `widths`: least stage widths to try; `frontier`: also look at plans of less depth.

    `report(flow, bound, method)` is called whenever the best flow rises or the bound falls.
    """

    def __init__(
        self,
        holding: Holding,
        *,
        seed: int,
        effort_s: float,
        out_of_time: Callable[[], bool],
        frontier: bool,
        widths: tuple[int, ...],
        report: Callable[[float, float, str], None] = lambda flow, bound, method: None,
    ) -> None:
        self._holding = holding
        self._flows = FlowModel(holding.spec)
        self._seed = seed
        self._effort_s = effort_s
        self._out_of_time = out_of_time
        self._frontier = frontier
        self._widths = widths
        self._small = len(holding.spec.nodes) <= SMALL
        self._pinned = any(holding.must_hold(node.id) for node in holding.spec.nodes)
        self._found: dict[tuple[tuple[NodeId, LayerRange], ...], Candidate] = {}
        self._report = report
        self._reported = (0.0, float("inf"))
        self._best_method = ""
        self.bound = capacity_bound(holding)

    def run(self) -> list[Candidate]:
        """All candidates found; empty if no placement carries anything. `bound` is final afterwards."""
        exact = best_of_all(self._holding, self._flows)
        if exact is not None:
            placement, proven = exact
            self._add(placement, "exhaustive")
            if proven:
                self._tighten(self._flows.value(placement))
        if not self._pinned:
            structures = [found for width in self._widths for found in self._stages(width)]
            if self._best() < max((found.goal for found in structures), default=0.0) * (1 - 1e-6):
                self._link_up(structures)
        if not self._proven():
            self._tighten(
                pattern_bound(
                    self._holding, self.bound, self._best(), steps=3 if self._small else 16,
                    out_of_time=self._out_of_time,
                )
            )  # fmt: skip
        near = self._best() >= self.bound * 0.95
        done = self._proven() and not self._frontier
        if not done and (self._small or self._pinned or not near):
            self._search_covers()
        if self._small or self._best() < self.bound * 0.5:
            self._chain_up()
        return list(self._found.values())

    def _best(self) -> float:
        return max((found.flow.value for found in self._found.values()), default=0.0)

    def _tighten(self, bound: float) -> None:
        self.bound = min(self.bound, bound)
        self._tell()

    def _tell(self) -> None:
        """Report the incumbent and the bound if either is better than what was last reported."""
        best = self._best()
        if best > self._reported[0] or self.bound < self._reported[1]:
            self._reported = (best, self.bound)
            self._report(best, self.bound, self._best_method)

    def _proven(self) -> bool:
        return self._best() >= self.bound * (1 - 1e-9)

    def _stages(self, width: int) -> list[_Structure]:
        """Stage covers, added as they lie; those whose flow the links do not carry come back."""
        every = kinds_of(self._holding)
        kinds = few_kinds(every)
        found = best_cover(
            kinds, self._holding.num_layers, self.bound, min_width=width, seed=self._seed, out_of_time=self._out_of_time
        )
        if found is None:
            return []
        flow, chosen = found
        structures = [self._structure(chosen, kinds)]
        if flow < self.bound * 0.999 and width == 1:
            self._refine(flow, structures[0].placement, kinds)
        bound_by_links = self._flows.value(structures[0].placement) < structures[0].goal * (1 - 1e-6)
        shares = {1 - 1e-6}
        shares |= set(_FRONTIER) if self._frontier else set()
        shares |= set(_LINKED) if bound_by_links else set()
        for share in sorted(shares, reverse=True):
            structures.extend(self._covers(kinds, flow * share, width, fewest=True))
        if bound_by_links and not self._small:
            for wide in _WIDE:
                wider = best_cover(kinds, self._holding.num_layers, flow, min_width=width, wide=wide, seed=self._seed)
                if wider is not None:
                    structures.append(self._structure(wider[1], kinds))
                    structures.extend(self._covers(kinds, wider[0] * 0.97, width, fewest=True, wide=wide))
        distinct = {tuple(found.placement.items()): found for found in structures if found.placement}
        for found_one in distinct.values():
            self._add(found_one.placement, "stages")
        return list(distinct.values())

    def _refine(self, flow: float, start: Placement, kinds: tuple[Kind, ...]) -> None:
        """More than uniform stages give: stages of lanes, then single nodes moved."""
        chosen = best_lane_cover(
            kinds, self._holding.num_layers, flow, self.bound, seed=self._seed, out_of_time=self._out_of_time
        )
        if chosen is not None:
            start = lay_out_lanes(chosen, kinds, self._holding.num_layers)
            self._add(start, "lanes")
            flow = least_cover(self._holding, start)
        moved = CoverSearch(self._holding, seed=self._seed).run(flow * 1.01, sweeps=30, start=start)
        if least_cover(self._holding, moved) > flow * (1 + 1e-9):
            self._add(moved, "lanes, cover search" if chosen is not None else "stages, cover search")

    def _covers(
        self, kinds: tuple[Kind, ...], flow: float, width: int, *, fewest: bool, wide: int = 0
    ) -> Iterator[_Structure]:
        if self._out_of_time():
            return
        found = cover(kinds, self._holding.num_layers, flow, min_width=width, fewest=fewest, wide=wide, seed=self._seed)
        if found is not None:
            yield self._structure(found, kinds)

    def _structure(self, stages: tuple[Stage, ...], kinds: tuple[Kind, ...]) -> _Structure:
        """A laid-out cover and the flow that its weakest stage has."""
        placement = lay_out(stages, kinds, self._holding.num_layers)
        return _Structure(placement, least_cover(self._holding, placement) if placement else 0.0)

    def _link_up(self, structures: list[_Structure]) -> None:
        """Order stages and nodes so that links feed them; the promising ones again with what effort is left."""
        tried: list[tuple[float, _Structure]] = []
        structures.sort(key=lambda found: -found.goal)
        for found in structures:
            if self._out_of_time() or (not self._frontier and self._best() >= found.goal * (1 - 1e-6)):
                break
            if self._flows.value(found.placement) >= found.goal * (1 - 1e-6):
                continue
            left, flow = self._arrange(found, _FIRST_MOVES, self._seed)
            if flow < found.goal * (1 - 1e-6):
                tried.append((left / found.goal, found))
        moves = int(self._effort_s * _MOVES_PER_S / _DEEPER)
        flows = int(self._effort_s * _FLOWS_PER_S / _DEEPER)
        best = self._best()
        promising = sorted((entry for entry in tried if entry[1].goal > best * (1 + 1e-6)), key=lambda entry: entry[0])
        for _, found in promising[:_DEEPER]:
            if self._out_of_time():
                return
            self._arrange(found, moves, self._seed + 1, evaluations=flows)

    def _arrange(self, structure: _Structure, moves: int, seed: int, *, evaluations: int = 300) -> tuple[float, float]:
        """Arrange one structure; returns the energy left and the true flow."""
        stages: dict[LayerRange, list[NodeId]] = {}
        for node, held in structure.placement.items():
            stages.setdefault(held, []).append(node)
        shape = [(len(held), tuple(nodes)) for held, nodes in sorted(stages.items())]
        arrangement = Arrangement(self._holding, self._flows, shape, structure.goal)
        left = arrangement.anneal(moves, seed=seed, out_of_time=self._out_of_time)
        placement = arrangement.placement()
        if not placement:
            return left, 0.0
        flow = self._flows.value(placement)
        if flow < structure.goal * (1 - 1e-6):
            placement, flow = improve(
                self._holding, self._flows, placement, evaluations=evaluations, goal=structure.goal,
                seed=seed, out_of_time=self._out_of_time,
            )  # fmt: skip
        self._add(placement, "stages, arranged")
        return left, flow

    def _search_covers(self) -> None:
        cover_search = CoverSearch(self._holding, seed=self._seed)
        closely = self._small or self._pinned
        shares = (1.0, 0.8, 0.6, 0.4) if closely else (1.0, 0.97, 0.94, 0.9)
        moves = self._effort_s * _COVER_MOVES_PER_S / len(shares)
        sweeps = 60 if closely else max(20, int(moves / len(self._holding.spec.nodes)))
        for share in shares:
            if self._out_of_time() and self._found:
                return
            placement = cover_search.run(self.bound * share, sweeps=sweeps)
            self._add(placement, "cover search", repair=closely)

    def _chain_up(self) -> None:
        chains = pipelines(self._holding, self._flows, seed=self._seed)
        if chains:
            self._add(self._with_pins(chains), "pipelines", repair=True)

    def _with_pins(self, placement: Placement) -> Placement:
        pinned = {
            node.id: self._holding.options(node.id)[0]
            for node in self._holding.spec.nodes
            if self._holding.must_hold(node.id)
            and (node.id not in placement or not self._holding.allows(node.id, placement[node.id]))
        }
        return placement | pinned

    def _add(self, placement: Placement, method: str, *, repair: bool = False) -> None:
        """Judge a placement, after a local search by true flow if asked for; what carries nothing is dropped."""
        if not placement:
            return
        if repair and self._flows.value(placement) < self.bound * (1 - 1e-6):
            evaluations = 1500 if self._small else int(self._effort_s * _FLOWS_PER_S)
            placement, _ = improve(
                self._holding, self._flows, placement, evaluations=evaluations, goal=self.bound, seed=self._seed,
                out_of_time=self._out_of_time,
            )  # fmt: skip
        placement = dict(sorted(placement.items()))
        key = tuple(placement.items())
        if key in self._found or not self._valid(placement):
            return
        flow = self._flows.solve(placement)
        if flow.value <= 0:
            return
        if flow.value > self._best():
            self._best_method = method
        self._found[key] = Candidate(
            placement, flow, predict(self._holding, placement, flow), self._survives(placement, flow), method
        )
        self._tell()

    def _survives(self, placement: Placement, flow: Flow) -> bool:
        holders = [0] * self._holding.num_layers
        for held in placement.values():
            for layer in held.layers():
                holders[layer] += 1
        if min(holders) < 2:
            return False
        return all(
            self._flows.value({node: held for node, held in placement.items() if node != lost}) > 0
            for lost in flow.through
        )

    def _valid(self, placement: Placement) -> bool:
        return all(self._holding.allows(node, held) for node, held in placement.items()) and all(
            node.id in placement for node in self._holding.spec.nodes if self._holding.must_hold(node.id)
        )
