"""From structures to placements that links feed: arranged, then mended by single moves, again while there is effort.

Budgets count moves, so that a seed gives the same placements on any machine.
"""

from collections.abc import Callable, Sequence

from helixd.plan.graph.flow import FlowModel
from helixd.plan.holding import Holding
from helixd.plan.search.arrange import Arrangement, stages_of
from helixd.plan.search.candidates import Candidates
from helixd.plan.search.repair import improve
from helixd.plan.search.structures import SMALL, Structure

_FIRST_MOVES = 8_000
_MOVES_PER_S = 40_000
_MORE_MOVES = 40_000
_DEEPER = 3
_HOPELESS = 0.3


class Linking:
    """Arranges structures of one cluster. `everything`: those of less flow than the best, too."""

    def __init__(
        self,
        holding: Holding,
        flows: FlowModel,
        found: Candidates,
        *,
        seed: int,
        effort_s: float,
        everything: bool,
        out_of_time: Callable[[], bool],
    ) -> None:
        self._holding = holding
        self._flows = flows
        self._found = found
        self._seed = seed
        self._effort_s = effort_s
        self._everything = everything
        self._out_of_time = out_of_time
        self._small = len(holding.spec.nodes) <= SMALL

    def once(self, structures: list[Structure]) -> list[tuple[float, Structure]]:
        """Order stages and nodes so that links feed them; what is left missing, for those that it was not done for."""
        tried: list[tuple[float, Structure]] = []
        for found in _thickest_first(structures, of_each_depth=self._everything):
            if self._out_of_time() or (not self._everything and self._found.best >= found.goal * (1 - 1e-6)):
                break
            if self._flows.value(found.placement) >= found.goal * (1 - 1e-6):
                continue
            left, flow = self._arrange(found, _FIRST_MOVES, self._seed)
            if flow < found.goal * (1 - 1e-6):
                tried.append((left / found.goal, found))
        return tried

    def again(self, tried: list[tuple[float, Structure]]) -> None:
        """The promising ones again and again from other beginnings, with what effort is left."""
        promising = [found for _, found in sorted(tried, key=lambda entry: entry[0])]
        moves = int(self._effort_s * _MOVES_PER_S)
        for again in range(1, 1 + moves // _MORE_MOVES):
            best = self._found.best
            promising = [
                found for found in promising if best * (1 + 1e-6) < found.goal <= self._found.bound * (1 + 1e-6)
            ]
            if not promising:
                return
            for found in promising[:_DEEPER]:
                moves -= _MORE_MOVES
                if moves < 0 or self._out_of_time():
                    return
                self._arrange(found, _MORE_MOVES, self._seed + again)
            # Those that have had their turn come last.
            promising = promising[_DEEPER:] + promising[:_DEEPER]

    def _arrange(self, structure: Structure, moves: int, seed: int, *, evaluations: int = 200) -> tuple[float, float]:
        """Arrange one structure; returns the energy left and the true flow."""
        stages = stages_of(structure.placement)
        if stages is None:
            return float("inf"), 0.0
        arrangement = Arrangement(self._holding, self._flows, stages, structure.goal)
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
        self._found.add(placement, "stages, arranged")
        return left, flow


def _thickest_first(structures: Sequence[Structure], *, of_each_depth: bool) -> list[Structure]:
    """By falling goal; `of_each_depth`: of those with as many stages, as safe ones, only the thickest."""
    ordered = sorted(structures, key=lambda found: -found.goal)
    if not of_each_depth:
        return ordered
    kept: dict[tuple[int, bool], Structure] = {}
    for found in ordered:
        ranges = list(found.placement.values())
        safe = all(ranges.count(held) > 1 for held in set(ranges))
        kept.setdefault((len(set(ranges)), safe), found)
    return list(kept.values())
