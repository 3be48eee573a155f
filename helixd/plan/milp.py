"""A mixed-integer program handed to HiGHS: silent, one thread, bounded time, same seed same answer.

Nothing but numbers goes in and out; the models are built where they are understood.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import highspy
import numpy as np

INF = float("inf")


@dataclass(slots=True)
class Program:
    """Minimise `cost @ x` over rows and bounds; built up column by column, row by row."""

    cost: list[float] = field(default_factory=list)
    lower: list[float] = field(default_factory=list)
    upper: list[float] = field(default_factory=list)
    integer: list[bool] = field(default_factory=list)
    rows: list[tuple[float, float, list[int], list[float]]] = field(default_factory=list)

    def column(self, cost: float, *, lower: float = 0.0, upper: float = INF, integer: bool = False) -> int:
        """Add a variable and return its index."""
        self.cost.append(cost)
        self.lower.append(lower)
        self.upper.append(upper)
        self.integer.append(integer)
        return len(self.cost) - 1

    def row(self, columns: Sequence[int], values: Sequence[float], *, lower: float = -INF, upper: float = INF) -> int:
        """Add `lower <= values @ x[columns] <= upper` and return the row's index."""
        self.rows.append((lower, upper, list(columns), list(values)))
        return len(self.rows) - 1


@dataclass(frozen=True, slots=True)
class Solution:
    """`values` of a feasible point, its cost, a valid lower bound on any, and the rows' duals (linear programs)."""

    values: tuple[float, ...]
    cost: float
    bound: float
    optimal: bool
    row_duals: tuple[float, ...] = ()


def solve(
    program: Program,
    *,
    time_limit_s: float = 10.0,
    seed: int = 0,
    gap: float = 1e-6,
    node_limit: int | None = None,
    hasty: bool = False,
) -> Solution | None:
    """The best point found; None if there is none (infeasible, or nothing found within the limits).

    `node_limit` bounds the search tree the same way on a fast and on a slow machine. `hasty`: without presolve and
    heuristics, which take longer than a tiny program does.
    """
    highs = highspy.Highs()  # type: ignore[no-untyped-call]
    for option, value in (
        ("output_flag", False),
        ("threads", 1),
        ("parallel", "off"),
        ("random_seed", seed),
        ("time_limit", time_limit_s),
        ("mip_rel_gap", gap),
        ("mip_abs_gap", 1e-9),
    ):
        highs.setOptionValue(option, value)
    if hasty:
        highs.setOptionValue("presolve", "off")
        highs.setOptionValue("mip_heuristic_effort", 0.0)
    if node_limit is not None:
        highs.setOptionValue("mip_max_nodes", node_limit)
    lp = highspy.HighsLp()
    count = len(program.cost)
    lp.num_col_ = count
    lp.num_row_ = len(program.rows)
    lp.col_cost_ = np.array(program.cost, dtype=np.float64)
    lp.col_lower_ = np.array(program.lower, dtype=np.float64)
    lp.col_upper_ = np.array(program.upper, dtype=np.float64)
    lp.row_lower_ = np.array([row[0] for row in program.rows], dtype=np.float64)
    lp.row_upper_ = np.array([row[1] for row in program.rows], dtype=np.float64)
    lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    lp.a_matrix_.start_ = np.cumsum([0, *(len(row[2]) for row in program.rows)], dtype=np.int32)
    lp.a_matrix_.index_ = np.array([i for row in program.rows for i in row[2]], dtype=np.int32)
    lp.a_matrix_.value_ = np.array([v for row in program.rows for v in row[3]], dtype=np.float64)
    mixed = any(program.integer)
    if mixed:
        kinds = (highspy.HighsVarType.kContinuous, highspy.HighsVarType.kInteger)
        lp.integrality_ = [kinds[int(flag)] for flag in program.integer]
    if highs.passModel(lp) == highspy.HighsStatus.kError:
        return None
    highs.run()
    info = highs.getInfo()
    if info.primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
        return None
    found = highs.getSolution()
    optimal = highs.getModelStatus() == highspy.HighsModelStatus.kOptimal
    cost = info.objective_function_value
    return Solution(
        values=tuple(found.col_value),
        cost=cost,
        bound=info.mip_dual_bound if mixed else (cost if optimal else -INF),
        optimal=optimal,
        row_duals=() if mixed else tuple(found.row_dual),
    )
