"""Max flow on a small directed network: Dinic's algorithm on floats.

Knows vertices as integers and capacities as numbers; what they stand for is `helixd.plan.graph.flow`'s business.
Exact up to `eps`, the capacity below which an arc counts as full.
"""

from collections import deque


class Network:
    """A flow network with residual arcs. Arc `a` and its reverse are `a` and `a ^ 1`.

    A flow may be laid before `augment`, which then keeps it and reroutes it only as needed.
    """

    __slots__ = ("_adj", "_cap", "_head", "eps")

    def __init__(self, vertices: int, eps: float = 1e-9) -> None:
        self._adj: list[list[int]] = [[] for _ in range(vertices)]
        self._head: list[int] = []
        self._cap: list[float] = []
        self.eps = eps

    def add_arc(self, tail: int, head: int, capacity: float) -> int:
        """Add an arc and return its number."""
        arc = len(self._head)
        self._head += (head, tail)
        self._cap += (capacity, 0.0)
        self._adj[tail].append(arc)
        self._adj[head].append(arc + 1)
        return arc

    def preload(self, arc: int, flow: float) -> None:
        """Put flow on `arc` before augmenting; the caller keeps it conserved and within the capacity."""
        self._cap[arc] -= flow
        self._cap[arc ^ 1] += flow

    def flow(self, arc: int) -> float:
        """What runs through `arc` now."""
        return self._cap[arc ^ 1]

    def augment(self, source: int, sink: int, *, enough: float = float("inf")) -> float:
        """Push as much more as fits from source to sink, or no further than `enough`; returns how much was added."""
        total = 0.0
        while total < enough and (level := self._levels(source, sink)) is not None:
            total += self._blocking_flow(source, sink, level)
        return total

    def reachable(self, source: int) -> list[bool]:
        """Vertices on the source's side of a minimum cut (after `augment`)."""
        seen = [False] * len(self._adj)
        seen[source] = True
        stack = [source]
        while stack:
            for arc in self._adj[stack.pop()]:
                head = self._head[arc]
                if self._cap[arc] > self.eps and not seen[head]:
                    seen[head] = True
                    stack.append(head)
        return seen

    def _levels(self, source: int, sink: int) -> list[int] | None:
        level = [-1] * len(self._adj)
        level[source] = 0
        queue = deque((source,))
        cap, heads, eps = self._cap, self._head, self.eps
        while queue:
            vertex = queue.popleft()
            if vertex == sink:
                return level
            for arc in self._adj[vertex]:
                head = heads[arc]
                if level[head] < 0 and cap[arc] > eps:
                    level[head] = level[vertex] + 1
                    queue.append(head)
        return None

    def _blocking_flow(self, source: int, sink: int, level: list[int]) -> float:
        adj, cap, heads, eps = self._adj, self._cap, self._head, self.eps
        position = [0] * len(adj)
        path: list[int] = []
        vertex, total = source, 0.0
        while True:
            if vertex == sink:
                pushed = min(cap[arc] for arc in path)
                total += pushed
                for arc in path:
                    cap[arc] -= pushed
                    cap[arc ^ 1] += pushed
                # Go on from the first arc that is full now, not from the source.
                first_full = next(i for i, arc in enumerate(path) if cap[arc] <= eps)
                vertex = heads[path[first_full] ^ 1]
                del path[first_full:]
                continue
            arcs, at = adj[vertex], position[vertex]
            while at < len(arcs) and not (cap[arcs[at]] > eps and level[heads[arcs[at]]] == level[vertex] + 1):
                at += 1
            position[vertex] = at
            if at < len(arcs):
                path.append(arcs[at])
                vertex = heads[arcs[at]]
            elif vertex == source:
                return total
            else:
                vertex = heads[path.pop() ^ 1]
                position[vertex] += 1
