"""Max flow by preflow push (Goldberg and Tarjan 1988, highest label first): another of the many max flows.

Which one comes out depends on the order of the arcs and on nothing else. The planner has its own max flow; this one
shows what the paper's simulator may have drawn from, whose library pushes preflows too.
"""

from collections import deque
from collections.abc import Sequence

Arc = tuple[int, int, float]


def preflow_push(vertices: int, arcs: Sequence[Arc], source: int, sink: int) -> list[float]:
    """The flow on each of `arcs` (tail, head, capacity), a maximum one from `source` to `sink`."""
    return _Preflow(vertices, arcs, source, sink).run()


class _Preflow:
    """Arc `i` and its reverse are `2 i` and `2 i + 1`. Vertices with excess wait in a bucket of their label."""

    def __init__(self, vertices: int, arcs: Sequence[Arc], source: int, sink: int) -> None:
        self.source, self.sink = source, sink
        self.head = [end for tail, head, _ in arcs for end in (head, tail)]
        self.room = [room for _, _, capacity in arcs for room in (capacity, 0.0)]
        self.out: list[list[int]] = [[] for _ in range(vertices)]
        for number, (tail, head, _) in enumerate(arcs):
            self.out[tail].append(2 * number)
            self.out[head].append(2 * number + 1)
        self.eps = 1e-12 * max(1e-9, *(capacity for _, _, capacity in arcs))
        self.excess = [0.0] * vertices
        self.at = [0] * vertices
        self.label = self._distances()
        self.buckets: list[deque[int]] = [deque() for _ in range(2 * vertices + 1)]

    def run(self) -> list[float]:
        self.excess[self.source] = float("inf")
        for arc in self.out[self.source]:
            if not arc % 2 and self.room[arc] > self.eps:
                self._push(self.source, arc, self.room[arc])
        highest = len(self.buckets) - 1
        while highest >= 0:
            if not self.buckets[highest]:
                highest -= 1
                continue
            highest = self._discharge(self.buckets[highest].popleft())
        return self.room[1::2]

    def _discharge(self, vertex: int) -> int:
        """Push away all excess of a vertex; the label to go on from."""
        out, label = self.out[vertex], self.label
        while self.excess[vertex] > self.eps:
            if self.at[vertex] == len(out):
                label[vertex] = 1 + min(label[self.head[arc]] for arc in out if self.room[arc] > self.eps)
                self.at[vertex] = 0
            arc = out[self.at[vertex]]
            if self.room[arc] > self.eps and label[vertex] == label[self.head[arc]] + 1:
                self._push(vertex, arc, min(self.excess[vertex], self.room[arc]))
            else:
                self.at[vertex] += 1
        return min(label[vertex], len(self.buckets) - 1)

    def _push(self, vertex: int, arc: int, amount: float) -> None:
        head = self.head[arc]
        waits = self.excess[head] > self.eps
        self.room[arc] -= amount
        self.room[arc ^ 1] += amount
        self.excess[vertex] -= amount
        self.excess[head] += amount
        if not waits and head not in (self.source, self.sink) and self.excess[head] > self.eps:
            self.buckets[self.label[head]].append(head)

    def _distances(self) -> list[int]:
        """Arcs to the sink, for the source the number of vertices; the same for whoever does not reach the sink."""
        far = len(self.out)
        label = [far] * far
        label[self.sink] = 0
        queue = deque((self.sink,))
        while queue:
            vertex = queue.popleft()
            for arc in self.out[vertex]:
                tail = self.head[arc]
                if self.room[arc ^ 1] > self.eps and label[tail] == far and tail not in (self.source, self.sink):
                    label[tail] = label[vertex] + 1
                    queue.append(tail)
        return label
