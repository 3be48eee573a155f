"""Who holds how much KV room where, as the coordinator believes it: in tokens x layers, soft, below the workers' limit.

A reservation is what a sequence is expected to grow to. It is given back exactly once per (sequence, attempt, node),
when the worker says it freed the KV, when the node starts a new life, or when a lease ends. Workers keep the hard
limit; `over` tells who has to be relieved. Workers give KV out in pages of `page_tokens`, so that is what is counted.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from helixd.errors import OutOfKv
from helixd.ids import Attempt, NodeId, SequenceId
from helixd.plan.cluster.spec import COORDINATOR

_FIRST = Attempt(0)
_Key = tuple[SequenceId, Attempt]


@dataclass(slots=True)
class _Held:
    layers: int
    tokens: int


class KvLedger:
    """The one owner of reservations. `high_water` is the share of a node's room that new sequences may fill.

    A sequence alone on a node may take all of it, so that the mark never makes a sequence unservable.
    """

    def __init__(
        self, capacity_token_layers: Mapping[NodeId, int], *, high_water: float = 0.95, page_tokens: int = 1
    ) -> None:
        if not 0 < high_water <= 1:
            raise ValueError(f"high_water must be in (0, 1], is {high_water}")
        if page_tokens < 1:
            raise ValueError(f"page_tokens must be at least 1, is {page_tokens}")
        self._page_tokens = page_tokens
        self._capacity = dict(capacity_token_layers)
        self._high_water = high_water
        self._held: dict[NodeId, dict[_Key, _Held]] = {}
        self._attempts: dict[SequenceId, set[Attempt]] = {}
        self._where: dict[_Key, dict[NodeId, _Held]] = {}
        self._used: dict[NodeId, int] = {}
        self._over: set[NodeId] = set()
        # The fewest tokens reserved anywhere for an attempt: below it nothing has to grow, which is most steps.
        self._least: dict[_Key, int] = {}

    def capacity(self, node: NodeId) -> int:
        """Room of `node` in tokens x layers; 0 for an unknown one."""
        return self._capacity.get(node, 0)

    def used(self, node: NodeId) -> int:
        """Reserved on `node`, in tokens x layers."""
        return self._used.get(node, 0)

    def fill(self, node: NodeId) -> float:
        """The share of the node's room that is reserved; 1 for a node without room. The coordinator counts as empty."""
        if node == COORDINATOR:
            return 0.0
        capacity = self.capacity(node)
        return self.used(node) / capacity if capacity else 1.0

    def total_used(self) -> int:
        """Reserved on all nodes together."""
        return sum(self._used.values())

    def holders(self, node: NodeId) -> tuple[tuple[SequenceId, Attempt], ...]:
        """Who holds something on `node`, oldest first."""
        return tuple(self._held.get(node, ()))

    def nodes_of(self, sequence: SequenceId, attempt: Attempt | None = None) -> tuple[NodeId, ...]:
        """Where a sequence holds something (in any attempt, or in one)."""
        found = {node: None for key in self._keys(sequence, attempt) for node in self._where[key]}
        return tuple(found)

    def set_capacity(self, node: NodeId, token_layers: int) -> None:
        """The node's room changed (a new plan). What is held stays held; `over` tells if it is too much now."""
        self._capacity[node] = token_layers
        self._change(node, 0)

    def affordable_tokens(self, node: NodeId, layers: int) -> int:
        """The most tokens one sequence can ever hold in `layers` layers of `node`, were it alone there."""
        return self.capacity(node) // (layers * self._page_tokens) * self._page_tokens

    def fits(self, node: NodeId, layers: int, tokens: int) -> bool:
        """Whether a new sequence may be admitted there now."""
        need, capacity, used = layers * self._paged(tokens), self.capacity(node), self.used(node)
        return used + need <= (capacity * self._high_water if used else capacity)

    def reserve(
        self, sequence: SequenceId, node: NodeId, layers: int, tokens: int, *, attempt: Attempt = _FIRST
    ) -> None:
        """Reserve `layers * tokens` in whole pages. Raises OutOfKv without room, ValueError if it holds some there."""
        if not self.fits(node, layers, tokens):
            raise OutOfKv(
                f"node {node} has no room for {layers} layers x {tokens} tokens: "
                f"{self.used(node)} of {self.capacity(node)} are reserved"
            )
        held = self._held.setdefault(node, {})
        if (sequence, attempt) in held:
            raise ValueError(f"sequence {sequence} attempt {attempt} already holds KV on {node}")
        key, tokens = (sequence, attempt), self._paged(tokens)
        held[key] = self._where.setdefault(key, {})[node] = _Held(layers, tokens)
        self._attempts.setdefault(sequence, set()).add(attempt)
        self._least[key] = min(tokens, self._least.get(key, tokens))
        self._change(node, layers * tokens)

    def grow(self, sequence: SequenceId, tokens: int, *, attempt: Attempt = _FIRST) -> tuple[NodeId, ...]:
        """The sequence has `tokens` tokens in KV now: where that is more than was reserved, the reservation follows.

        Returns the nodes of the sequence that are over their capacity now; somebody there has to give way.
        """
        key, tokens = (sequence, attempt), self._paged(tokens)
        least = self._least.get(key)
        if least is None or (tokens <= least and not self._over):
            return ()
        self._least[key] = max(least, tokens)
        for node, held in self._where[key].items():
            if tokens > held.tokens:
                more = held.layers * (tokens - held.tokens)
                held.tokens = tokens
                self._change(node, more)
        return tuple(node for node in self._where[key] if node in self._over) if self._over else ()

    def release(self, sequence: SequenceId, node: NodeId, *, attempt: Attempt | None = None) -> int:
        """Give back what a sequence (one attempt of it, or all) holds on `node`; how much it was. Safe to repeat."""
        freed = 0
        for key in self._keys(sequence, attempt):
            held = self._held.get(node, {}).pop(key, None)
            if held is not None:
                freed += held.layers * held.tokens
                self._unlink(key, node)
        if freed:
            self._change(node, -freed)
        return freed

    def release_everywhere(self, sequence: SequenceId, *, attempt: Attempt | None = None) -> int:
        """Give back what a sequence holds on all nodes; how much it was."""
        return sum(self.release(sequence, node, attempt=attempt) for node in self.nodes_of(sequence, attempt))

    def forget_node(self, node: NodeId) -> int:
        """The node lost all its KV (a new life, or gone): nothing is held there any more; how much it was."""
        for key in self._held.pop(node, {}):
            self._unlink(key, node)
        self._over.discard(node)
        return self._used.pop(node, 0)

    def over(self) -> tuple[NodeId, ...]:
        """Nodes that hold more than their capacity."""
        return tuple(node for node in self._used if node in self._over)

    def _change(self, node: NodeId, token_layers: int) -> None:
        used = self._used.get(node, 0) + token_layers
        if token_layers:
            self._used[node] = used
        if used > self.capacity(node):
            self._over.add(node)
        else:
            self._over.discard(node)

    def _paged(self, tokens: int) -> int:
        return -(-tokens // self._page_tokens) * self._page_tokens

    def _keys(self, sequence: SequenceId, attempt: Attempt | None) -> list[_Key]:
        return [(sequence, known) for known in sorted(self._attempts.get(sequence, ())) if attempt in (None, known)]

    def _unlink(self, key: _Key, node: NodeId) -> None:
        del self._where[key][node]
        if not self._where[key]:
            del self._where[key], self._least[key]
            self._attempts[key[0]].discard(key[1])
            if not self._attempts[key[0]]:
                del self._attempts[key[0]]
