"""The cheapest one-to-one assignment (the Hungarian method with potentials; Jonker and Volgenant 1987): few rows, fast.

For a dozen rows this is done before a solver has been set up.
"""

from collections.abc import Sequence
from math import inf


def assign(costs: Sequence[Sequence[float]]) -> list[int]:
    """For each row of a square matrix its column, all different, of the least sum of costs."""
    count = len(costs)
    row_price, column_price = [0.0] * count, [0.0] * (count + 1)
    owner = [-1] * (count + 1)  # of each column; the last one stands for the row that is placed now
    for row in range(count):
        owner[count] = row
        at = count
        least, came, done = [inf] * count, [count] * count, [False] * (count + 1)
        while owner[at] >= 0:
            done[at] = True
            own = owner[at]
            own_costs, price = costs[own], row_price[own]
            step, nearest = inf, -1
            for column in range(count):
                if done[column]:
                    continue
                reduced = own_costs[column] - price - column_price[column]
                if reduced < least[column]:
                    least[column], came[column] = reduced, at
                if least[column] < step:
                    step, nearest = least[column], column
            for column in range(count + 1):
                if done[column]:
                    row_price[owner[column]] += step
                    column_price[column] -= step
                elif column < count:
                    least[column] -= step
            at = nearest
        while at != count:
            owner[at] = owner[came[at]]
            at = came[at]
    columns = [0] * count
    for column in range(count):
        columns[owner[column]] = column
    return columns
