"""Candidate placements of a cluster, from every method that suits it, each judged by its true max flow.

Which candidate is best is the planner's decision; here is only what can be had. Budgets count moves and flows, in
proportion to `effort_s`, so that a seed gives the same candidates on any machine; the clock can only end it early.
"""

from collections.abc import Callable

from helixd.plan.bounds import pattern_bound
from helixd.plan.graph.flow import FlowModel
from helixd.plan.holding import Holding
from helixd.plan.search.candidates import Candidate, Candidates, Placement
from helixd.plan.search.chains import pipelines
from helixd.plan.search.cover import CoverSearch
from helixd.plan.search.crossings import cannot_cross
from helixd.plan.search.exhaustive import best_of_all
from helixd.plan.search.linking import Linking
from helixd.plan.search.regions import part_of, pods, regions
from helixd.plan.search.repair import improve
from helixd.plan.search.structures import SMALL, Structure, Structures

__all__ = ["LARGE", "SMALL", "Candidate", "Search"]

# From so many nodes on, stages are generated one by one: there are too many to list.
LARGE = 60
# Per second of effort, with room to spare for the rest: flows and moves of the two local searches.
_FLOWS_PER_S = 300
_COVER_MOVES_PER_S = 4_000


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
        self._found = Candidates(holding, self._flows, report)
        self._covers = CoverSearch(holding, seed=seed)
        self._podded = False
        self._exact = False

    @property
    def bound(self) -> float:
        """What no placement exceeds, as far as is known."""
        return self._found.bound

    def run(self) -> list[Candidate]:
        """All candidates found; empty if no placement carries anything. `bound` is final afterwards."""
        structures_of = Structures(
            self._holding, self._flows, self._found, self._covers, seed=self._seed, frontier=self._frontier,
            brief=self._brief, out_of_time=self._out_of_time,
        )  # fmt: skip
        linking = Linking(
            self._holding, self._flows, self._found, seed=self._seed, effort_s=self._effort_s,
            everything=self._frontier, out_of_time=self._out_of_time,
        )  # fmt: skip
        exact = best_of_all(self._holding, self._flows)
        if exact is not None:
            placement, proven = exact
            self._found.add(placement, "exhaustive")
            if proven:
                self._exact = True
                self._found.tighten(self._found.best)
                if not self._frontier or not placement:
                    return self._found.all()
        if not self._pinned and not self._brief:
            self._plant_pods()
        unfinished: list[tuple[float, Structure]] = []
        if not self._pinned and not self._podded:
            make = structures_of.generated if len(self._holding.usable()) >= LARGE else structures_of.listed
            structures = [found for width in self._widths for found in make(width)]
            if self._found.best < max((found.goal for found in structures), default=0.0) * (1 - 1e-6):
                unfinished = linking.once(structures)
        if self._brief:
            return self._found.all()
        if not self._found.proven():
            self._found.tighten(
                pattern_bound(
                    self._holding, self._found.bound, self._found.best, steps=3 if self._small else 16,
                    also=lambda flow: cannot_cross(self._holding, self._flows, flow),
                    out_of_time=self._out_of_time,
                )
            )  # fmt: skip
        if self._frontier or not self._found.proven():
            linking.again(unfinished)
        near = self._found.best >= self._found.bound * 0.95
        done = self._found.proven() and not self._frontier
        # Covers are searched without a look at links: where those bind it is of no use.
        unsure = not near and not self._podded and not unfinished
        if not done and (self._small or self._pinned or unsure):
            self._search_covers()
        if self._small or self._found.best < self._found.bound * 0.5:
            self._chain_up()
        return self._found.all()

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
            self._found.add(placement, "pipelines by region")
        # Stages of a large cluster that cross slow links would have to be very wide.
        self._podded = len(self._holding.usable()) >= LARGE and self._found.best > 0

    def _search_covers(self) -> None:
        closely = self._small or self._pinned
        shares = (1.0, 0.8, 0.6, 0.4) if closely else (1.0, 0.97, 0.94, 0.9)
        moves = self._effort_s * _COVER_MOVES_PER_S / len(shares)
        sweeps = 60 if closely else max(20, int(moves / len(self._holding.spec.nodes)))
        for share in shares:
            if self._out_of_time() and self._found.best > 0:
                return
            placement = self._covers.run(self._found.bound * share, sweeps=sweeps)
            (self._add_repaired if closely else self._found.add)(placement, "cover search")

    def _chain_up(self) -> None:
        chains = pipelines(self._holding, self._flows, seed=self._seed)
        if chains:
            self._add_repaired(self._with_pins(chains), "pipelines")

    def _with_pins(self, placement: Placement) -> Placement:
        pinned = {
            node.id: self._holding.options(node.id)[0]
            for node in self._holding.spec.nodes
            if self._holding.must_hold(node.id)
            and (node.id not in placement or not self._holding.allows(node.id, placement[node.id]))
        }
        return placement | pinned

    def _add_repaired(self, placement: Placement, method: str) -> None:
        """Add a placement after a local search by true flow."""
        if placement and self._flows.value(placement) < self._found.bound * (1 - 1e-6):
            evaluations = int(self._effort_s * _FLOWS_PER_S)
            if self._small:
                # With the most flow known, what is looked for is only other ways to serve.
                evaluations = 150 if self._exact else 1500
            placement, _ = improve(
                self._holding, self._flows, placement, evaluations=evaluations, goal=self._found.bound,
                seed=self._seed, out_of_time=self._out_of_time,
            )  # fmt: skip
        self._found.add(placement, method)


def _flow_of(found: Candidate) -> float:
    return found.flow.value


def _decode_of(found: Candidate) -> float:
    return found.prediction.decode_tokens_per_s if found.prediction else found.flow.value
