"""Structures: stages that cover all layers, thick or few, before links are looked at.

Each is added to the candidates as it lies. Where links bind, what they do not feed comes back:
`helixd.plan.search.linking` then looks for an order and for nodes that they do feed.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from helixd.plan.graph.flow import FlowModel
from helixd.plan.holding import Holding
from helixd.plan.search.candidates import Candidates, Placement
from helixd.plan.search.columns import StageColumns
from helixd.plan.search.cover import CoverSearch, least_cover
from helixd.plan.search.lanes import lay_out_lanes
from helixd.plan.search.stages import Kind, Stage, best_cover, cover, few_kinds, kinds_of, lay_out

# Clusters of up to so many nodes have few stages to choose from.
SMALL = 8
# Flows, as shares of the best cover, at which the fewest stages are looked for.
_FRONTIER = (0.97, 0.94, 0.9, 0.85, 0.8, 0.72, 0.64, 0.56, 0.48, 0.4, 0.32, 0.25)
# Shares at which stages are looked for that links, where they bind, may be able to feed.
_LINKED = (0.99, 0.98, 0.97, 0.96, 0.95, 0.94, 0.92, 0.9, 0.88, 0.86, 0.82, 0.78, 0.74, 0.66, 0.58, 0.5)
# The same for large clusters, which have fewer of either.
_THICK_FRONTIER = (0.93, 0.85, 0.75, 0.64, 0.5, 0.36, 0.25)
_THICK_LINKED = (0.96, 0.88, 0.78, 0.66, 0.5)
# The same for stages of lanes.
_LANES_LINKED = (1.0, 0.985, 0.97, 0.95, 0.92)
# Numbers of stages of several nodes that slow links between regions may need.
_WIDE = (2, 3, 4, 6)
_POLISHING_MOVES = 6_000


@dataclass(frozen=True, slots=True)
class Structure:
    """Stages without an order: what links have to be found for. `goal`: what they carry if links do not bind."""

    placement: Placement
    goal: float


class Structures:
    """Makes structures of one cluster. `frontier`: of less depth too; `brief`: only what is quickly made."""

    def __init__(
        self,
        holding: Holding,
        flows: FlowModel,
        found: Candidates,
        covers: CoverSearch,
        *,
        seed: int,
        frontier: bool,
        brief: bool,
        out_of_time: Callable[[], bool],
    ) -> None:
        self._holding = holding
        self._flows = flows
        self._found = found
        self._covers_by_moves = covers
        self._seed = seed
        self._frontier = frontier
        self._brief = brief
        self._out_of_time = out_of_time
        self._small = len(holding.spec.nodes) <= SMALL

    def listed(self, width: int) -> list[Structure]:
        """Stage covers, added as they lie; those whose flow the links do not carry come back."""
        every = kinds_of(self._holding)
        kinds = few_kinds(every)
        found = best_cover(
            kinds,
            self._holding.num_layers,
            self._found.bound,
            min_width=width,
            seed=self._seed,
            out_of_time=self._out_of_time,
        )
        if found is None:
            return []
        flow, chosen = found
        structures = [self._structure(chosen, kinds)]
        if flow < self._found.bound * 0.999 and width == 1:
            structures.extend(self._refine(flow, structures[0].placement, kinds))
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
            self._found.add(found_one.placement, "stages")
        return list(distinct.values())

    def generated(self, width: int) -> list[Structure]:
        """The same for a large cluster, with too many stages to list; what comes back is without lanes."""
        kinds = few_kinds(kinds_of(self._holding))
        num_layers = self._holding.num_layers
        columns = StageColumns(kinds, num_layers, min_width=width, seed=self._seed)
        # Large fleets come near the bound.
        found = columns.best(0.0, self._found.bound, first=0.9, out_of_time=self._out_of_time)
        if found is None:
            return []
        flow = found[0]
        placement = self._polished(lay_out_lanes(found[1], kinds, num_layers))
        self._found.add(placement, "lanes by columns")
        if self._frontier:
            for share in _THICK_FRONTIER:
                if self._out_of_time():
                    return []
                stages = columns.cover(flow * share, fewest=True)
                if stages is not None:
                    self._found.add(
                        self._polished(lay_out_lanes(stages, kinds, num_layers), sweeps=2), "lanes by columns"
                    )
        if self._flows.value(placement) >= least_cover(self._holding, placement) * (1 - 1e-6):
            return []
        plain = StageColumns(kinds, num_layers, length=1, min_width=width, seed=self._seed)
        structures = []
        for share in _THICK_LINKED:
            stages = None if self._out_of_time() else plain.cover(flow * share, fewest=True)
            if stages is not None:
                placement = lay_out_lanes(stages, kinds, num_layers)
                structures.append(Structure(placement, least_cover(self._holding, placement)))
        return structures

    def _polished(self, start: Placement, *, sweeps: int | None = None) -> Placement:
        """A cover after moving single nodes: left-over ones find a place, and so do those that do not fit an end."""
        if sweeps is None:
            sweeps = max(3, min(30, _POLISHING_MOVES // len(self._holding.spec.nodes)))
        flow = least_cover(self._holding, start)
        return self._covers_by_moves.run(flow * 1.01, sweeps=sweeps, start=start)

    def _refine(self, flow: float, start: Placement, kinds: tuple[Kind, ...]) -> Iterator[Structure]:
        """More than uniform stages give: stages of lanes, then single nodes moved. What links starve comes back."""
        num_layers, least = self._holding.num_layers, flow
        near, method = 4e-3 if self._brief else 5e-4, "stages"
        for length in (2,) if self._brief else (2, 3):
            columns = StageColumns(kinds, num_layers, length=length, seed=self._seed)
            # Longer lanes are looked for from the beginning again: what is found hangs on what is asked for.
            found = columns.best(least, self._found.bound, near=near, first=0.3, out_of_time=self._out_of_time)
            if found is None:
                continue
            laid = lay_out_lanes(found[1], kinds, num_layers)
            self._found.add(laid, "lanes")
            covered = least_cover(self._holding, laid)
            if covered > flow:
                start, flow, method = laid, covered, "lanes"
            if self._brief or self._flows.value(laid) >= covered * (1 - 1e-6):
                continue
            for share in _LANES_LINKED:
                lanes = columns.cover(covered * share) if covered * share > least and not self._out_of_time() else None
                if lanes is not None:
                    placement = lay_out_lanes(lanes, kinds, num_layers)
                    yield Structure(placement, least_cover(self._holding, placement))
        moved = self._covers_by_moves.run(flow * 1.01, sweeps=30, start=start)
        if least_cover(self._holding, moved) > flow * (1 + 1e-9):
            self._found.add(moved, f"{method}, cover search")

    def _covers(
        self, kinds: tuple[Kind, ...], flow: float, width: int, *, fewest: bool, wide: int = 0
    ) -> Iterator[Structure]:
        if self._out_of_time():
            return
        found = cover(kinds, self._holding.num_layers, flow, min_width=width, fewest=fewest, wide=wide, seed=self._seed)
        if found is not None:
            yield self._structure(found, kinds)

    def _structure(self, stages: tuple[Stage, ...], kinds: tuple[Kind, ...]) -> Structure:
        """A laid-out cover and the flow that its weakest stage has."""
        placement = lay_out(stages, kinds, self._holding.num_layers)
        return Structure(placement, least_cover(self._holding, placement) if placement else 0.0)
