"""What no placement of a cluster can exceed. Links are not looked at, so the bounds hold with any links.

Both count, for a wanted flow F, how much of the nodes' capacity to cover layers is needed. The capacity bound lets a
node cover in fractions; the pattern bound knows that a layer is covered by whole nodes.
"""

from collections.abc import Callable, Sequence

from helixd.plan import milp
from helixd.plan.graph.flow import node_capacity
from helixd.plan.holding import Holding

_COLUMNS = 60
# A bound is sharp enough when so much of it, or of the gap it leaves, is in doubt.
_WORTHWHILE = 2e-5
_OF_THE_GAP = 0.03
# The least flow more than what is reached that is asked for.
_NEXT = 1e-7

# What a pattern carries, and how much of a node of each kind it spends.
Pattern = tuple[float, dict[int, float]]


def capacity_bound(holding: Holding) -> float:
    """The largest F with `sum over nodes of max_j j * min(T(j), F) >= F * num_layers`.

    Between neighbouring values of T the slack is convex in F, so it is enough to look at those and bisect once.
    """
    curves = curves_of(holding)
    loose = sum(count * max(j * rate for j, rate in enumerate(curve, 1)) for curve, count in curves)
    loose /= holding.num_layers

    def enough(flow: float) -> bool:
        held = sum(count * max(j * min(rate, flow) for j, rate in enumerate(curve, 1)) for curve, count in curves)
        return held >= flow * holding.num_layers * (1 - 1e-12)

    if enough(loose):
        return loose
    ends = sorted({rate for curve, _ in curves for rate in curve if rate < loose} | {0.0}, reverse=True)
    low = next(flow for flow in ends if enough(flow))
    high = min((flow for flow in ends if flow > low), default=loose)
    for _ in range(100):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        low, high = (middle, high) if enough(middle) else (low, middle)
    return high


def pattern_bound(
    holding: Holding,
    high: float,
    low: float,
    *,
    steps: int = 16,
    also: Callable[[float], bool] = lambda flow: False,
    out_of_time: Callable[[], bool] = lambda: False,
) -> float:
    """A bound at most `high`, by up to `steps` bisections down to `low`, a flow that is known to be reached.

    `also`: another proof that a flow is impossible, tried where this one fails.

    For a fixed F a layer is covered by a pattern: nodes that hold j layers each, whose T(j) add up to F. One that
    holds j layers spends 1/j of itself on each. With a price per node such that all nodes together cost 1, no
    placement reaches F if even the cheapest pattern costs more than 1 / num_layers.
    """
    curves, reached = curves_of(holding), low
    columns: list[Pattern] = []

    def impossible(flow: float) -> bool:
        return _impossible(curves, holding.num_layers, flow, columns) or also(flow)

    # Often what is reached is the most there is.
    if 0 < reached * (1 + _NEXT) < high and impossible(reached * (1 + _NEXT)):
        return reached * (1 + _NEXT)
    for _ in range(steps):
        if high - low <= max(_WORTHWHILE * high, _OF_THE_GAP * (high - reached)) or out_of_time():
            break
        middle = (low + high) / 2
        if impossible(middle):
            high = middle
        else:
            low = middle
    return high


def curves_of(holding: Holding) -> list[tuple[tuple[float, ...], int]]:
    """T(j) of every kind of node, pinned ones included as if they were free, and how many there are."""
    counts: dict[tuple[float, ...], int] = {}
    for node in holding.usable():
        longest = holding.max_layers(node.id)
        curve = tuple(node_capacity(holding.spec, node, layers) for layers in range(1, longest + 1))
        counts[curve] = counts.get(curve, 0) + 1
    return list(counts.items())


def _impossible(
    curves: Sequence[tuple[tuple[float, ...], int]], num_layers: int, flow: float, known: list[Pattern]
) -> bool:
    """Whether prices are found that prove that no placement carries `flow`: column generation on the patterns.

    `known` are patterns of earlier calls, which are of use again; new ones are added.
    """
    # A kind alone covers a layer with as many of its nodes as it takes; a start for the master program.
    columns: list[dict[int, float]] = [spent for rate, spent in known if rate >= flow]
    for kind, (curve, _) in enumerate(curves):
        wholes = [(-(-flow // rate)) / j for j, rate in enumerate(curve, 1) if rate > 0]
        if wholes:
            columns.append({kind: min(wholes)})
    for _ in range(_COLUMNS):
        prices, needed = _master(curves, num_layers, columns)
        if prices is None or needed <= 1:
            return False
        cheapest = cheapest_pattern(curves, prices, flow)
        if cheapest is None:
            return False
        cost_bound, rate, pattern = cheapest
        known.append((rate, pattern))
        if cost_bound * num_layers > 1 + 1e-9:
            return True
        if sum(prices[kind] * spent for kind, spent in pattern.items()) * num_layers >= needed * (1 - 1e-9):
            return False
        columns.append(pattern)
    return False


def _master(
    curves: Sequence[tuple[tuple[float, ...], int]], num_layers: int, columns: Sequence[dict[int, float]]
) -> tuple[list[float] | None, float]:
    """The share of all nodes that covering every layer with these patterns takes, and the prices that say so."""
    program = milp.Program()
    share = program.column(1.0)
    uses = [program.column(0.0) for _ in columns]
    program.row(uses, [1.0] * len(uses), lower=num_layers, upper=num_layers)
    for kind, (_, count) in enumerate(curves):
        using = [(uses[i], spent) for i, column in enumerate(columns) if (spent := column.get(kind, 0.0)) > 0]
        program.row([share, *(i for i, _ in using)], [count, *(-spent for _, spent in using)], lower=0.0)
    solution = milp.solve(program)
    if solution is None or not solution.optimal:
        return None, 0.0
    prices = [max(0.0, dual) for dual in solution.row_duals[1:]]
    total = sum(price * count for price, (_, count) in zip(prices, curves, strict=True))
    if total <= 0:
        return None, 0.0
    return [price / total for price in prices], solution.values[share]


def cheapest_pattern(
    curves: Sequence[tuple[tuple[float, ...], int]], prices: Sequence[float], flow: float, *, least_nodes: int = 1
) -> tuple[float, float, dict[int, float]] | None:
    """The cheapest nodes whose T(j) add up to `flow`: a bound on their cost, T, and what of each kind they take.

    At least `least_nodes` of them, needed or not.
    """
    program = milp.Program()
    items: list[tuple[int, int]] = []
    for kind, (curve, count) in enumerate(curves):
        for j, rate in enumerate(curve, 1):
            # More of a type, held longer for no less, is never the better choice.
            if rate > 0 and not any(later >= rate for later in curve[j:]):
                program.column(prices[kind] / j, upper=count, integer=True)
                items.append((kind, j))
    if not items:
        return None
    rates = [min(flow, curves[kind][0][j - 1]) for kind, j in items]
    program.row(range(len(items)), rates, lower=flow * (1 - 1e-9))
    for kind, (_, count) in enumerate(curves):
        own = [i for i, (other, _) in enumerate(items) if other == kind]
        program.row(own, [1.0] * len(own), upper=count)
    if least_nodes > 1:
        program.row(range(len(items)), [1.0] * len(items), lower=least_nodes)
    solution = milp.solve(program, gap=2e-5, hasty=True)
    if solution is None:
        return None
    pattern: dict[int, float] = {}
    carried = 0.0
    for (kind, j), times in zip(items, solution.values, strict=True):
        if round(times):
            pattern[kind] = pattern.get(kind, 0.0) + round(times) / j
            carried += round(times) * curves[kind][0][j - 1]
    return solution.bound, carried, pattern
