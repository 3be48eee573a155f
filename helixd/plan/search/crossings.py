"""A bound that knows of slow links: what no placement can carry because it has to cross them.

Take a flow F and the links that carry F alone; nodes connected by them are an island. A layer that a single node holds
passes all of F on, so the next layer can be a single node's only on the same island. Between layers of single nodes
on different islands there is therefore a layer held by several nodes. Such layers may cost more than single ones; with
a price for each node, as in `helixd.plan.bounds`, that proves flows impossible which the nodes alone could carry.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from helixd.ids import NodeId
from helixd.plan import milp
from helixd.plan.bounds import cheapest_pattern
from helixd.plan.graph.flow import FlowModel, node_capacity
from helixd.plan.holding import Holding
from helixd.plan.search.regions import islands

# With more islands than this there are too many sets of them to look at.
_MOST_ISLANDS = 6
_COLUMNS = 60

Curves = list[tuple[tuple[float, ...], int]]


@dataclass(frozen=True, slots=True)
class _Fleet:
    """Kinds of nodes by T(j) and island."""

    curves: Curves
    island: list[int]
    num_layers: int


def cannot_cross(holding: Holding, flows: FlowModel, flow: float) -> bool:
    """Whether it is proven that no placement carries `flow`, links being as they are."""
    nodes = [node.id for node in holding.usable()]
    found = islands(flows, nodes, flow * (1 - 1e-9))
    if not 1 < len(found) <= _MOST_ISLANDS:
        return False
    fleet = _fleet(holding, found)
    # Whichever islands have layers of single nodes: all of them first, which is the likeliest to be possible.
    return all(
        _impossible(fleet, flow, frozenset(chosen))
        for size in range(len(found), -1, -1)
        for chosen in combinations(range(len(found)), size)
    )


def _fleet(holding: Holding, found: Sequence[Sequence[NodeId]]) -> _Fleet:
    counts: dict[tuple[int, tuple[float, ...]], int] = {}
    for number, members in enumerate(found):
        for node in members:
            spec = holding.node(node)
            curve = tuple(node_capacity(holding.spec, spec, j) for j in range(1, holding.max_layers(node) + 1))
            counts[number, curve] = counts.get((number, curve), 0) + 1
    return _Fleet(
        [(curve, n) for (_, curve), n in counts.items()], [number for number, _ in counts], holding.num_layers
    )


def _impossible(fleet: _Fleet, flow: float, singles: frozenset[int]) -> bool:
    """Whether prices prove it for placements whose single-node layers are on the islands `singles`, some on each."""
    several = max(0, len(singles) - 1)
    single = [
        (kind, j)
        for kind, (curve, _) in enumerate(fleet.curves)
        if fleet.island[kind] in singles
        for j, rate in enumerate(curve, 1)
        if rate >= flow * (1 - 1e-9)
    ]
    columns: list[tuple[dict[int, float], bool]] = [({kind: 1 / j}, False) for kind, j in single]
    prices = [1 / (count * len(fleet.curves)) for _, count in fleet.curves]
    for _ in range(_COLUMNS):
        cheapest = cheapest_pattern(fleet.curves, prices, flow, least_nodes=2)
        # Nodes that cannot carry it together leave single ones; where a crossing is needed there is none then.
        wide = cheapest[0] if cheapest is not None else float("inf")
        narrow = min((prices[kind] / j for kind, j in single), default=float("inf"))
        if several and wide == float("inf"):
            return True
        least = (fleet.num_layers - several) * min(narrow, wide) + (several * wide if several else 0.0)
        if least > 1 + 1e-9:
            return True
        if cheapest is None or cheapest[2] in [spent for spent, is_wide in columns if is_wide]:
            return False
        columns.append((cheapest[2], True))
        solved = _master(fleet, columns, several)
        if solved is None:
            continue
        prices, share = solved
        if share <= 1:
            return False
    return False


def _master(
    fleet: _Fleet, columns: Sequence[tuple[dict[int, float], bool]], several: int
) -> tuple[list[float], float] | None:
    """Prices at which covering the layers with these patterns takes the largest share of all nodes, and that share."""
    program = milp.Program()
    share = program.column(1.0)
    uses = [program.column(0.0) for _ in columns]
    program.row(uses, [1.0] * len(uses), lower=fleet.num_layers, upper=fleet.num_layers)
    for kind, (_, count) in enumerate(fleet.curves):
        using = [(uses[i], spent[kind]) for i, (spent, _) in enumerate(columns) if spent.get(kind, 0.0) > 0]
        program.row([share, *(i for i, _ in using)], [count, *(-spent for _, spent in using)], lower=0.0)
    wide = [uses[i] for i, (_, is_wide) in enumerate(columns) if is_wide]
    program.row(wide, [1.0] * len(wide), lower=several)
    solution = milp.solve(program)
    if solution is None or not solution.optimal:
        return None
    prices = [max(0.0, dual) for dual in solution.row_duals[1 : 1 + len(fleet.curves)]]
    total = sum(price * count for price, (_, count) in zip(prices, fleet.curves, strict=True))
    if total <= 0:
        return None
    return [price / total for price in prices], solution.values[share]
