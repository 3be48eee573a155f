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
from helixd.plan.columns import StageColumns
from helixd.plan.cover import CoverSearch, least_cover
from helixd.plan.crossings import cannot_cross
from helixd.plan.exhaustive import best_of_all
from helixd.plan.flow import Flow, FlowModel
from helixd.plan.holding import Holding
from helixd.plan.lanes import lay_out_lanes
from helixd.plan.predict import Prediction, predict
from helixd.plan.regions import part_of, pods, regions
from helixd.plan.repair import improve
from helixd.plan.stages import Kind, Stage, best_cover, cover, few_kinds, kinds_of, lay_out

# Clusters of up to so many nodes are searched more closely.
SMALL = 8
# From so many nodes on, stages are generated one by one: there are too many to list.
LARGE = 60

# Flows, as shares of the best cover, at which the fewest stages are looked for.
_FRONTIER = (0.97, 0.94, 0.9, 0.85, 0.8, 0.72, 0.64, 0.56, 0.48, 0.4, 0.32, 0.25)
# Shares at which stages are looked for that links, where they bind, may be able to feed.
_LINKED = (0.99, 0.98, 0.97, 0.96, 0.95, 0.94, 0.92, 0.9, 0.88, 0.86, 0.82, 0.78, 0.74, 0.66, 0.58, 0.5)
# The same for large clusters, which have fewer of either.
_THICK_FRONTIER = (0.93, 0.85, 0.75, 0.64, 0.5, 0.36, 0.25)
_THICK_LINKED = (0.96, 0.88, 0.78, 0.66, 0.5)
# Numbers of stages of several nodes that slow links between regions may need.
_WIDE = (2, 3, 4, 6)
# Per second of effort, with room to spare for the rest: annealing moves, flows and moves of the two local searches.
_MOVES_PER_S = 20_000
_FLOWS_PER_S = 300
_COVER_MOVES_PER_S = 4_000
_FIRST_MOVES = 8_000
_MORE_MOVES = 40_000
_HOPELESS = 0.3
_DEEPER = 3
_POLISHING_MOVES = 6_000
# Bounds are proven to so much above what is reached.
_PROVEN = 1e-6

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

    `report(flow, bound, method)` is called whenever the best flow rises or the bound falls. `brief`: for a part of a
    larger cluster; the bound stays as it is at first.
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
        brief: bool = False,
    ) -> None:
        self._holding = holding
        self._flows = FlowModel(holding.spec)
        self._seed = seed
        self._effort_s = effort_s
        self._out_of_time = out_of_time
        self._frontier = frontier
        self._widths = widths
        self._brief = brief
        self._small = len(holding.spec.nodes) <= SMALL
        self._pinned = any(holding.must_hold(node.id) for node in holding.spec.nodes)
        self._found: dict[tuple[tuple[NodeId, LayerRange], ...], Candidate] = {}
        self._covers_by_moves = CoverSearch(holding, seed=seed)
        self._report = report
        self._reported = (0.0, float("inf"))
        self._best_method = ""
        self._podded = False
        self._exact = False
        self.bound = capacity_bound(holding)

    def run(self) -> list[Candidate]:
        """All candidates found; empty if no placement carries anything. `bound` is final afterwards."""
        exact = best_of_all(self._holding, self._flows)
        if exact is not None:
            placement, proven = exact
            self._add(placement, "exhaustive")
            if proven:
                self._exact = True
                self._tighten(self._best())
                if not self._frontier or not placement:
                    return list(self._found.values())
        if not self._pinned and not self._brief:
            self._plant_pods()
        unfinished: list[tuple[float, _Structure]] = []
        if not self._pinned and not self._podded:
            make = self._thick if len(self._holding.usable()) >= LARGE else self._stages
            structures = [found for width in self._widths for found in make(width)]
            if self._best() < max((found.goal for found in structures), default=0.0) * (1 - 1e-6):
                unfinished = self._link_up(structures)
        if self._brief:
            return list(self._found.values())
        if not self._proven():
            self._tighten(
                pattern_bound(
                    self._holding, self.bound, self._best(), steps=3 if self._small else 16,
                    also=lambda flow: cannot_cross(self._holding, self._flows, flow),
                    out_of_time=self._out_of_time,
                )
            )  # fmt: skip
        if self._frontier or not self._proven():
            self._link_up_more(unfinished)
        near = self._best() >= self.bound * 0.95
        done = self._proven() and not self._frontier
        # Covers are searched without a look at links: where those bind it is of no use.
        unsure = not near and not self._podded and not unfinished
        if not done and (self._small or self._pinned or unsure):
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
        return self._best() >= self.bound * (1 - _PROVEN)

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

    def _plant_pods(self) -> None:
        """One pipeline for each region that can hold the model, side by side."""
        groups = pods(self._holding, regions(self._holding, self._flows))
        if len(groups) < 2:
            return
        parts: list[list[Candidate]] = []
        for members in groups:
            if self._out_of_time():
                break
            search = Search(
                Holding(part_of(self._holding.spec, members)), seed=self._seed, effort_s=self._effort_s / len(groups),
                out_of_time=self._out_of_time, frontier=self._frontier, widths=self._widths, brief=True,
            )  # fmt: skip
            parts.append(search.run())
        for worth in (_flow_of, _decode_of) if self._frontier else (_flow_of,):
            placement: Placement = {}
            for part in parts:
                if part:
                    placement |= max(part, key=worth).placement
            self._add(placement, "pipelines by region")
        # Stages of a large cluster that cross slow links would have to be very wide.
        self._podded = len(self._holding.usable()) >= LARGE and bool(self._found)

    def _thick(self, width: int) -> list[_Structure]:
        """The same for a large cluster; what comes back where links bind has stages without lanes."""
        kinds = few_kinds(kinds_of(self._holding))
        num_layers = self._holding.num_layers
        columns = StageColumns(kinds, num_layers, min_width=width, seed=self._seed)
        # Large fleets come near the bound.
        found = columns.best(0.0, self.bound, first=0.9, out_of_time=self._out_of_time)
        if found is None:
            return []
        flow = found[0]
        placement = self._polished(lay_out_lanes(found[1], kinds, num_layers))
        self._add(placement, "lanes by columns")
        if self._frontier:
            for share in _THICK_FRONTIER:
                if self._out_of_time():
                    return []
                stages = columns.cover(flow * share, fewest=True)
                if stages is not None:
                    self._add(self._polished(lay_out_lanes(stages, kinds, num_layers), sweeps=2), "lanes by columns")
        if self._flows.value(placement) >= least_cover(self._holding, placement) * (1 - 1e-6):
            return []
        plain = StageColumns(kinds, num_layers, length=1, min_width=width, seed=self._seed)
        structures = []
        for share in _THICK_LINKED:
            stages = None if self._out_of_time() else plain.cover(flow * share, fewest=True)
            if stages is not None:
                placement = lay_out_lanes(stages, kinds, num_layers)
                structures.append(_Structure(placement, least_cover(self._holding, placement)))
        return structures

    def _polished(self, start: Placement, *, sweeps: int | None = None) -> Placement:
        """A cover after moving single nodes: left-over ones find a place, and so do those that do not fit an end."""
        if sweeps is None:
            sweeps = max(3, min(30, _POLISHING_MOVES // len(self._holding.spec.nodes)))
        flow = least_cover(self._holding, start)
        return self._covers_by_moves.run(flow * 1.01, sweeps=sweeps, start=start)

    def _refine(self, flow: float, start: Placement, kinds: tuple[Kind, ...]) -> None:
        """More than uniform stages give: stages of lanes, then single nodes moved."""
        columns = StageColumns(kinds, self._holding.num_layers, length=2 if self._brief else 3, seed=self._seed)
        found = columns.best(
            flow, self.bound, near=4e-3 if self._brief else 5e-4, first=0.3, out_of_time=self._out_of_time
        )
        if found is not None:
            start = lay_out_lanes(found[1], kinds, self._holding.num_layers)
            self._add(start, "lanes")
            flow = least_cover(self._holding, start)
        moved = self._covers_by_moves.run(flow * 1.01, sweeps=30, start=start)
        if least_cover(self._holding, moved) > flow * (1 + 1e-9):
            self._add(moved, "lanes, cover search" if found is not None else "stages, cover search")

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

    def _link_up(self, structures: list[_Structure]) -> list[tuple[float, _Structure]]:
        """Order stages and nodes so that links feed them; what is left missing, for those that it was not done for."""
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
        return tried

    def _link_up_more(self, tried: list[tuple[float, _Structure]]) -> None:
        """The promising ones again and again from other beginnings, with what effort is left."""
        promising = [found for _, found in sorted(tried, key=lambda entry: entry[0])]
        moves = int(self._effort_s * _MOVES_PER_S)
        for again in range(1, 1 + moves // _MORE_MOVES):
            best = self._best()
            promising = [found for found in promising if best * (1 + 1e-6) < found.goal <= self.bound * (1 + 1e-6)]
            for found in promising[:_DEEPER]:
                moves -= _MORE_MOVES
                if moves < 0 or self._out_of_time():
                    return
                self._arrange(found, _MORE_MOVES, self._seed + again)
            # Those that have had their turn come last.
            promising = promising[_DEEPER:] + promising[:_DEEPER]

    def _arrange(self, structure: _Structure, moves: int, seed: int, *, evaluations: int = 200) -> tuple[float, float]:
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
        # Where much is missing, moving single nodes will not make up for it.
        if flow < structure.goal * (1 - 1e-6) and (left <= _HOPELESS * structure.goal or self._small):
            placement, flow = improve(
                self._holding, self._flows, placement, evaluations=evaluations, goal=structure.goal,
                seed=seed, out_of_time=self._out_of_time,
            )  # fmt: skip
        self._add(placement, "stages, arranged")
        return left, flow

    def _search_covers(self) -> None:
        closely = self._small or self._pinned
        shares = (1.0, 0.8, 0.6, 0.4) if closely else (1.0, 0.97, 0.94, 0.9)
        moves = self._effort_s * _COVER_MOVES_PER_S / len(shares)
        sweeps = 60 if closely else max(20, int(moves / len(self._holding.spec.nodes)))
        for share in shares:
            if self._out_of_time() and self._found:
                return
            placement = self._covers_by_moves.run(self.bound * share, sweeps=sweeps)
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
            evaluations = int(self._effort_s * _FLOWS_PER_S)
            if self._small:
                # With the most flow known, what is looked for is only other ways to serve.
                evaluations = 150 if self._exact else 1500
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
            placement, flow, predict(self._holding, placement, flow), self._flows.survives(placement), method
        )
        self._tell()

    def _valid(self, placement: Placement) -> bool:
        return all(self._holding.allows(node, held) for node, held in placement.items()) and all(
            node.id in placement for node in self._holding.spec.nodes if self._holding.must_hold(node.id)
        )


def _flow_of(found: Candidate) -> float:
    return found.flow.value


def _decode_of(found: Candidate) -> float:
    return found.prediction.decode_tokens_per_s if found.prediction else found.flow.value
