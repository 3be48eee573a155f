"""A new plan for a cluster that serves already: what to move, and what is not worth moving.

Loading weights takes minutes on real disks and networks, and a node that loads does not serve. So placements are
compared by what they serve within a horizon: `while loading` for as long as the slowest node loads, with the nodes
that stay as they are, then in full. Candidates are the placement as it is, repairs that move few layers, and plans
from scratch brought near to what nodes hold. Pure and deterministic for a seed; small clusters, pinned ones and those
whose links bind are searched more closely.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isinf

from helixd.ids import NodeId
from helixd.layers import LayerRange
from helixd.plan.bounds import capacity_bound
from helixd.plan.cluster.spec import ClusterSpec
from helixd.plan.explain import explanations
from helixd.plan.graph.flow import Flow, FlowModel
from helixd.plan.graph.schedule import schedule_of
from helixd.plan.holding import Holding
from helixd.plan.moves import Move, Placement, load_bytes, relabelled, reordered, total_bytes
from helixd.plan.plan import Infeasible, Plan
from helixd.plan.predict import predict
from helixd.plan.search.columns import StageColumns
from helixd.plan.search.cover import CoverSearch, least_cover
from helixd.plan.search.lanes import lay_out_lanes
from helixd.plan.search.methods import SMALL, Search
from helixd.plan.search.regions import regions
from helixd.plan.search.repair import improve
from helixd.plan.search.stages import best_cover, cover, few_kinds, kinds_of, lay_out

# Where nothing is to be saved by a worse plan, plans this close to the best are told apart by the bytes they move.
_SAME = 0.005
# What is given up, unasked, for a plan that survives the loss of any one node.
_SURVIVAL_PRICE = 0.1
# Shares of the best cover that plans from scratch aim at, where depth counts, and that repairs aim at.
_SHALLOWER = (0.94, 0.88, 0.8, 0.7, 0.6, 0.5)
_REPAIRS = ((1.0, 0.02), (0.9, 0.05), (0.75, 0.1), (0.5, 0.1))
_SWEEPS = 4
# How near to the best cover plans from scratch come, as a share of it.
_NEAR = 5e-3
# Up to so many nodes all stages are listed for a plan with fewer of them, and for the thickest cover: of many nodes,
# stages made as they are needed are thicker, move less and are found sooner.
_LISTED, _LISTED_THICKEST = 60, 30
_FLOWS_PER_S = 300
_MOST_SEARCH_S = 3.0


@dataclass(frozen=True, slots=True)
class Option:
    """One way to go on. `worth` is what the objective counts, in tokens/s: predicted decode, or the max flow.

    `served_tokens` within the horizon: `worth_while_loading` for `load_s`, then `worth`. `method` says how it was made.
    """

    placement: Mapping[NodeId, LayerRange]
    flow_tokens_per_s: float
    worth: float
    worth_while_loading: float
    load_bytes: float
    load_s: float
    served_tokens: float
    method: str


@dataclass(frozen=True, slots=True)
class Replan:
    """The plan chosen, the nodes whose ranges change (moving the most first), and the trade that was open.

    `options`: each serves more than the ones before it once loaded, and moves more bytes; the chosen one is among them
    unless it is only as good as the best. `load_s`: seconds until everything serves, all nodes loading at once.
    """

    plan: Plan
    moves: tuple[Move, ...]
    load_bytes: float
    load_s: float
    options: tuple[Option, ...]


def replan(
    spec: ClusterSpec,
    *,
    load_bytes_per_s: float | Mapping[NodeId, float],
    current: Mapping[NodeId, LayerRange] | None = None,
    horizon_s: float = 3600.0,
    objective: str = "throughput",
    survive: int | None = None,
    seed: int = 0,
    time_limit_s: float = 10.0,
    clock: Callable[[], float] | None = None,
) -> Replan:
    """The placement that serves most within `horizon_s`, coming from `current` (None: the nodes' `current_range`).

    `load_bytes_per_s`: how fast weights are loaded, measured, of all nodes or by node. `horizon_s`: for how long the
    plan is expected to stay; infinite (or 0 bytes to load) asks for the best plan whatever it moves, and of nearly
    equal ones for the one that moves least. `survive`: 1 takes only plans that keep a pipeline when any one node is
    lost, if there are any; 0 does not care; None prefers them where they cost little (never for "max-flow").
    Objectives are "throughput" and "max-flow".

    Raises Infeasible if no placement serves the model, ValueError for an unknown objective or a speed that is not
    above 0.
    """
    if objective not in ("throughput", "max-flow"):
        raise ValueError(f"objective {objective!r} is none of throughput, max-flow")
    speeds = (
        {node.id: load_bytes_per_s for node in spec.nodes}
        if isinstance(load_bytes_per_s, int | float)
        else dict(load_bytes_per_s)
    )
    if slow := [node.id for node in spec.nodes if not speeds.get(node.id, 0.0) > 0]:
        raise ValueError(f"no speed above 0 is given at which {slow[0]} loads weights")
    started = clock() if clock else 0.0
    if survive is None and objective == "max-flow":
        survive = 0
    held = current if current is not None else {n.id: n.current_range for n in spec.nodes if n.current_range}
    change = _Change(spec, held, speeds, horizon_s, objective, seed)
    change.consider(
        widths=(1,) if survive == 0 else (2,) if survive else (1, 2),
        effort_s=time_limit_s,
        out_of_time=lambda: bool(clock and clock() - started > time_limit_s),
    )
    chosen = change.best(survive)
    holding = change.holding
    flow = change.flows.solve(chosen.placement)
    prediction = predict(holding, chosen.placement, flow)
    plan = Plan(
        num_layers=holding.num_layers,
        placement=chosen.placement,
        schedule=schedule_of(flow),
        max_flow_tokens_per_s=flow.value,
        upper_bound_tokens_per_s=change.bound,
        predicted_decode_tokens_per_s=prediction.decode_tokens_per_s if prediction else None,
        kv_capacity_token_layers=holding.kv_capacity(chosen.placement),
        explanations=explanations(holding, chosen.placement, flow),
        method=chosen.method,
        solve_s=clock() - started if clock else 0.0,
    )
    return Replan(plan, change.moves(chosen.placement), chosen.load_bytes, chosen.load_s, change.trade())


class _Change:
    """The options there are to go on from what nodes hold."""

    def __init__(
        self,
        spec: ClusterSpec,
        current: Mapping[NodeId, LayerRange],
        speeds: Mapping[NodeId, float],
        horizon_s: float,
        objective: str,
        seed: int,
    ) -> None:
        self.holding = Holding(spec)
        self.holding.check_memory()
        self.flows = FlowModel(spec)
        self.bound = capacity_bound(self.holding)
        self._model = spec.model
        known = {node.id for node in spec.nodes}
        self._current = {node: held for node, held in sorted(current.items()) if node in known}
        self._speeds = speeds
        self._horizon_s = horizon_s
        self._objective = objective
        self._seed = seed
        self._options: dict[tuple[tuple[NodeId, LayerRange], ...], Option] = {}

    def consider(self, *, widths: tuple[int, ...], effort_s: float, out_of_time: Callable[[], bool]) -> None:
        """Collect options: as it is, from scratch, repaired."""
        as_it_is = self._staying()
        self._add(as_it_is, "as it is")
        goal = 0.0
        pinned = any(self.holding.must_hold(node.id) for node in self.holding.spec.nodes)
        links_bind = False
        if not pinned:
            for placement, method in (made for width in widths for made in self._from_scratch(width)):
                goal = max(goal, least_cover(self.holding, placement))
                links_bind |= self.flows.value(placement) < least_cover(self.holding, placement) * (1 - 1e-6)
                self._add_near(placement, method, anywhere=not links_bind)
        closely = pinned or links_bind or len(self.holding.usable()) <= SMALL
        effort_s = min(effort_s, _MOST_SEARCH_S)
        if closely:
            search = Search(
                self.holding, seed=self._seed, effort_s=effort_s, out_of_time=out_of_time,
                frontier=self._objective != "max-flow", widths=widths,
            )  # fmt: skip
            for found in search.run():
                goal = max(goal, found.flow.value)
                self._add_near(found.placement, found.method, anywhere=not (pinned or links_bind))
            self.bound = min(self.bound, search.bound)
        if isinf(self._horizon_s) and self._options:
            return
        evaluations = int(effort_s * _FLOWS_PER_S / len(_REPAIRS)) if closely else 0
        self._repair(as_it_is, goal, evaluations, out_of_time)

    def best(self, survive: int | None) -> Option:
        """The option that serves most within the horizon; of nearly equal ones the one that moves least."""
        options = list(self._options.values())
        if not options:
            raise Infeasible(
                f"no chain of the {len(self.holding.usable())} usable nodes holds all {self.holding.num_layers} layers "
                "over links that exist: check links between nodes, pins and exclusions"
            )
        if survive != 0:
            price = 1.0 if survive else _SURVIVAL_PRICE
            least = max(option.served_tokens for option in options) * (1 - price)
            safe = [o for o in options if o.served_tokens >= least and self.flows.survives(o.placement)]
            options = safe or options
        top = max(option.served_tokens for option in options)
        near = [option for option in options if option.served_tokens >= top * (1 - _SAME)]
        return min(near, key=lambda option: (option.load_bytes, -option.served_tokens))

    def trade(self) -> tuple[Option, ...]:
        """Options that are worth more than every one that moves less."""
        found: list[Option] = []
        for option in sorted(self._options.values(), key=lambda option: (option.load_bytes, -option.worth)):
            if not found or option.worth > found[-1].worth * (1 + 1e-6):
                found.append(option)
        return tuple(found)

    def moves(self, placement: Mapping[NodeId, LayerRange]) -> tuple[Move, ...]:
        """What each node does whose range changes, from the most bytes to the fewest."""
        moved = []
        for node in sorted({*self._current, *placement}):
            before, after = self._current.get(node), placement.get(node)
            if before != after:
                size = load_bytes(self._model, before, after)
                moved.append(Move(node, before, after, size, size / self._speeds[node]))
        return tuple(sorted(moved, key=lambda move: (-move.load_bytes, move.node)))

    def _staying(self) -> Placement:
        """What nodes hold now, as far as they still may, and pinned nodes where the pin says."""
        staying = {node: held for node, held in self._current.items() if self.holding.allows(node, held)}
        for node in self.holding.spec.nodes:
            if self.holding.must_hold(node.id) and node.id not in staying:
                staying[node.id] = self.holding.options(node.id)[0]
        return dict(sorted(staying.items()))

    def _from_scratch(self, width: int) -> Iterator[tuple[Placement, str]]:
        """Covers of all layers, thickest first; links are not looked at."""
        num_layers, seed = self.holding.num_layers, self._seed
        kinds = few_kinds(kinds_of(self.holding))
        columns = StageColumns(kinds, num_layers, min_width=width, seed=seed)
        low = 0.0
        listed = len(self.holding.usable()) < _LISTED
        listed_thickest = len(self.holding.usable()) <= _LISTED_THICKEST
        if listed_thickest:
            stages = best_cover(kinds, num_layers, self.bound, min_width=width, seed=seed, precision=_NEAR)
            if stages is not None:
                low = stages[0]
                yield lay_out(stages[1], kinds, num_layers), "stages"
        if low < self.bound * (1 - 1e-6):
            lanes = columns.best(low, self.bound, near=_NEAR, first=0.3 if listed_thickest else 0.9)
            if lanes is not None:
                low = lanes[0]
                yield lay_out_lanes(lanes[1], kinds, num_layers), "lanes"
        if self._objective == "max-flow":
            return
        for share in _SHALLOWER:
            if listed:
                fewer = cover(kinds, num_layers, low * share, min_width=width, fewest=True, seed=seed)
                if fewer is not None:
                    yield lay_out(fewer, kinds, num_layers), "stages"
            elif (thinner := columns.cover(low * share, fewest=True)) is not None:
                yield lay_out_lanes(thinner, kinds, num_layers), "lanes"

    def _repair(self, as_it_is: Placement, goal: float, evaluations: int, out_of_time: Callable[[], bool]) -> None:
        """From what nodes hold, moves of single nodes that pay for what they load."""
        search = CoverSearch(self.holding, seed=self._seed)
        for share, price in _REPAIRS:
            if out_of_time():
                return
            moved = search.run(goal * share, sweeps=_SWEEPS, start=as_it_is, price=price, eager=False)
            if evaluations:
                moved, _ = improve(
                    self.holding, self.flows, moved, evaluations=evaluations, goal=goal * share, seed=self._seed,
                    out_of_time=out_of_time,
                )  # fmt: skip
            self._add(moved, "repaired")

    def _add_near(self, placement: Placement, method: str, *, anywhere: bool) -> None:
        """A placement given to those nodes that hold most of it; `anywhere`: its stages may stand in another order."""
        if not placement:
            return
        equal = [list(kind.nodes) for kind in kinds_of(self.holding)]
        if anywhere:
            ways = [placement, reordered(self.holding, self._current, placement, equal)]
            ways = [relabelled(self._model, self._current, way, equal) for way in ways]
            nearest = min(ways, key=lambda way: total_bytes(self._model, self._current, way))
            # Links that seemed not to bind may do so on other nodes, or in another order.
            if self.flows.value(nearest) >= self.flows.value(placement) * (1 - _SAME):
                self._add(nearest, method)
                return
        self._add(placement, method)
        near = regions(self.holding, self.flows)
        groups = [[node for node in kind if node in region] for kind in equal for region in near]
        self._add(self._traded(placement, [group for group in groups if len(group) > 1]), method)

    def _traded(self, placement: Placement, groups: Sequence[Sequence[NodeId]]) -> Placement:
        """Ranges traded among like nodes of a region, as far as links carry the flow as before."""
        least = self.flows.value(placement) * (1 - _SAME)
        for group in groups:
            tried = relabelled(self._model, self._current, placement, [group])
            if tried != placement and self.holding.allows_all(tried) and self.flows.value(tried) >= least:
                placement = tried
        return placement

    def _add(self, placement: Placement, method: str) -> None:
        placement = dict(sorted(placement.items()))
        key = tuple(placement.items())
        if not placement or key in self._options or not self.holding.allows_all(placement):
            return
        flow = self._flow(placement)
        if flow.value <= 0:
            return
        size = total_bytes(self._model, self._current, placement)
        load_s = max(
            load_bytes(self._model, self._current.get(node), held) / self._speeds[node]
            for node, held in placement.items()
        )
        worth = self._worth(placement, flow)
        while_loading = 0.0
        if isinf(self._horizon_s):
            served = worth
        else:
            kept = {node: held for node, held in placement.items() if self._current.get(node) == held}
            while_loading = worth
            if len(kept) < len(placement):
                while_loading = self._worth(kept, self._flow(kept)) if least_cover(self.holding, kept) > 0 else 0.0
            loading_s = min(load_s, self._horizon_s)
            served = while_loading * loading_s + worth * (self._horizon_s - loading_s)
        self._options[key] = Option(placement, flow.value, worth, while_loading, size, load_s, served, method)

    def _flow(self, placement: Placement) -> Flow:
        return self.flows.solve(placement, spread=self._objective != "max-flow")

    def _worth(self, placement: Placement, flow: Flow) -> float:
        if self._objective == "max-flow" or flow.value <= 0:
            return flow.value
        prediction = predict(self.holding, placement, flow)
        return prediction.decode_tokens_per_s if prediction is not None else flow.value


def lost(spec: ClusterSpec, gone: NodeId) -> ClusterSpec:
    """The cluster without one node."""
    return replace(
        spec,
        nodes=tuple(node for node in spec.nodes if node.id != gone),
        links=tuple(link for link in spec.links if gone not in (link.src, link.dst)),
    )
