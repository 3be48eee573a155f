"""What a change of placement moves: bytes to load per node, and how to give ranges to nodes so that few are.

Equal nodes can stand for each other, and where links do not matter, whole stages can stand anywhere. Both are used to
bring a new placement near to what nodes hold already. Knows nothing of how good a placement is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from helixd.ids import NodeId
from helixd.layers import LayerRange
from helixd.plan import milp
from helixd.plan.assign import assign
from helixd.plan.cluster.spec import ModelSpec
from helixd.plan.holding import Holding

Placement = dict[NodeId, LayerRange]

# Orders of stages that are followed at the same time while one is put together.
_BEAM = 12
# Up to so many nodes are paired one by one; more as a program.
_FEW = 16


@dataclass(frozen=True, slots=True)
class Move:
    """A node whose range changes. `load_bytes`: weights it does not hold yet; 0 where it only lets layers go."""

    node: NodeId
    before: LayerRange | None
    after: LayerRange | None
    load_bytes: float
    load_s: float


@dataclass(frozen=True, slots=True)
class Block:
    """Ranges that lie together, relative to the block's start; no other range of the placement reaches into it."""

    layers: int
    parts: tuple[tuple[int, LayerRange], ...]
    """(kind of node, range), sorted."""


def load_bytes(model: ModelSpec, before: LayerRange | None, after: LayerRange | None) -> float:
    """Weights that a node holding `before` has to load to hold `after`: new layers, embedding and head if new."""
    if after is None:
        return 0.0
    kept = max(0, min(after.end, before.end) - max(after.start, before.start)) if before is not None else 0
    size = (len(after) - kept) * model.layer_bytes
    if after.start == 0 and not (before is not None and before.start == 0):
        size += model.embedding_bytes
    if after.end == model.num_layers and not (before is not None and before.end == model.num_layers):
        size += model.head_bytes
    return size


def total_bytes(model: ModelSpec, before: Mapping[NodeId, LayerRange], after: Mapping[NodeId, LayerRange]) -> float:
    """Weights that all nodes together have to load."""
    return sum(load_bytes(model, before.get(node), held) for node, held in after.items())


def relabelled(
    model: ModelSpec,
    current: Mapping[NodeId, LayerRange],
    placement: Mapping[NodeId, LayerRange],
    equal: Sequence[Sequence[NodeId]],
) -> Placement:
    """The placement with ranges traded among `equal` nodes so that the fewest bytes move.

    A transport problem for each group: from ranges held now to ranges wanted. Nodes in no group keep their range.
    """
    result = dict(placement)
    for members in equal:
        wanted: dict[LayerRange | None, int] = {}
        holders: dict[LayerRange | None, list[NodeId]] = {}
        for node in members:
            result.pop(node, None)
            wanted[placement.get(node)] = wanted.get(placement.get(node), 0) + 1
            holders.setdefault(current.get(node), []).append(node)
        for (before, after), count in _transport(model, holders, wanted).items():
            for _ in range(count):
                node = holders[before].pop(0)
                if after is not None:
                    result[node] = after
    return dict(sorted(result.items()))


def _transport(
    model: ModelSpec,
    holders: Mapping[LayerRange | None, Sequence[NodeId]],
    wanted: Mapping[LayerRange | None, int],
) -> dict[tuple[LayerRange | None, LayerRange | None], int]:
    """How many nodes go from each range held to each range wanted."""
    kept = {(held, held): min(len(nodes), wanted.get(held, 0)) for held, nodes in holders.items()}
    supply = [(held, len(nodes) - kept[held, held]) for held, nodes in holders.items()]
    supply = [(held, count) for held, count in supply if count]
    demand = [(held, count - kept.get((held, held), 0)) for held, count in wanted.items()]
    demand = [(held, count) for held, count in demand if count]
    plan = {pair: count for pair, count in kept.items() if count}
    if len(supply) == 1 or len(demand) == 1:
        return plan | {(before, after): min(n, m) for before, n in supply for after, m in demand}
    if not supply:
        return plan
    if sum(count for _, count in supply) <= _FEW:
        olds = [held for held, count in supply for _ in range(count)]
        news = [held for held, count in demand for _ in range(count)]
        chosen = assign([[load_bytes(model, old, new) for new in news] for old in olds])
        for old, j in zip(olds, chosen, strict=True):
            plan[old, news[j]] = plan.get((old, news[j]), 0) + 1
        return plan
    program = milp.Program()
    # Bytes are counted in layers: numbers near 1 suit the solver.
    pairs = [(before, after) for before, _ in supply for after, _ in demand]
    for before, after in pairs:
        program.column(load_bytes(model, before, after) / model.layer_bytes)
    for i, (_, count) in enumerate(supply):
        own = range(i * len(demand), (i + 1) * len(demand))
        program.row(own, [1.0] * len(own), lower=count, upper=count)
    for j, (_, count) in enumerate(demand):
        own = range(j, len(pairs), len(demand))
        program.row(own, [1.0] * len(own), lower=count, upper=count)
    solution = milp.solve(program)
    if solution is None or any(abs(value - round(value)) > 1e-6 for value in solution.values):
        # A vertex of a transport problem is whole; this is a solver that did not end at one.
        program.integer = [True] * len(pairs)
        solution = milp.solve(program)
    assert solution is not None, "supply and demand are equal, so there is a transport"
    return plan | {pair: round(value) for pair, value in zip(pairs, solution.values, strict=True) if round(value)}


def blocks_of(placement: Mapping[NodeId, LayerRange], kind_of: Mapping[NodeId, int], num_layers: int) -> list[Block]:
    """A placement cut wherever no range reaches across."""
    reached = [False] * (num_layers + 1)
    for held in placement.values():
        for layer in range(held.start + 1, held.end):
            reached[layer] = True
    cuts = [layer for layer in range(num_layers + 1) if not reached[layer]]
    blocks = []
    for start, end in pairwise(cuts):
        parts = sorted(
            (kind_of[node], held) for node, held in placement.items() if start <= held.start and held.end <= end
        )
        blocks.append(
            Block(end - start, tuple((kind, LayerRange(h.start - start, h.end - start)) for kind, h in parts))
        )
    return blocks


def reordered(
    holding: Holding,
    current: Mapping[NodeId, LayerRange],
    placement: Mapping[NodeId, LayerRange],
    equal: Sequence[Sequence[NodeId]],
) -> Placement:
    """The placement's blocks in an order, and on nodes, that move few bytes: a beam search from the first layer on.

    For clusters whose links do not bind: the order changes neither the cover of the layers nor the depth. Every node
    of the placement has to be in a group of `equal`. The same placement comes back if no order is found that the nodes
    at the ends allow.
    """
    model = holding.spec.model
    kind_of = {node: k for k, members in enumerate(equal) for node in members}
    nearest: dict[tuple[int, int, int], _Nearest] = {}

    def put(given: Placement, block: Block, start: int) -> tuple[float, Placement] | None:
        """The nodes not given out yet that load least to hold `block` at `start`; None if they may not stand there."""
        placed: Placement = {}
        spent = 0.0
        for kind, part in block.parts:
            key = (kind, start + part.start, start + part.end)
            if key not in nearest:
                nearest[key] = _nearest(holding, current, equal[kind], LayerRange(*key[1:]))
            found = nearest[key]
            node, size = next((e for e in found.nodes if e[0] not in given and e[0] not in placed), (None, 0.0))
            if node is None:
                return None
            placed[node] = found.held
            spent += size
        return spent, placed

    blocks = blocks_of(placement, kind_of, holding.num_layers)
    shapes = sorted(set(blocks), key=lambda block: (block.layers, block.parts))
    left = tuple(blocks.count(shape) for shape in shapes)
    # (bytes so far, blocks left of each shape, layers done, nodes given out)
    beam: list[tuple[float, tuple[int, ...], int, Placement]] = [(0.0, left, 0, {})]
    for _ in blocks:
        ahead: dict[tuple[int, ...], tuple[float, tuple[int, ...], int, Placement]] = {}
        for spent, counts, start, given in beam:
            for s, shape in enumerate(shapes):
                if not counts[s]:
                    continue
                rest = (*counts[:s], counts[s] - 1, *counts[s + 1 :])
                # The same blocks used in another order: only the cheapest goes on.
                known = ahead.get(rest)
                if known is not None and known[0] <= spent:
                    continue
                step = put(given, shape, start)
                if step is not None and (known is None or spent + step[0] < known[0]):
                    ahead[rest] = (spent + step[0], rest, start + shape.layers, given | step[1])
        # Cheapest for the layers done: orders differ in how far they have come.
        beam = sorted(ahead.values(), key=lambda state: (state[0] - state[2] * model.layer_bytes, state[1]))[:_BEAM]
    if not beam:
        return dict(placement)
    best = min(beam, key=lambda state: (state[0], state[1]))
    return dict(sorted(best[3].items()))


@dataclass(frozen=True, slots=True)
class _Nearest:
    """The nodes of a kind by the bytes they load to hold a range; none if they may not."""

    held: LayerRange
    nodes: tuple[tuple[NodeId, float], ...]


def _nearest(
    holding: Holding, current: Mapping[NodeId, LayerRange], members: Sequence[NodeId], held: LayerRange
) -> _Nearest:
    if not members or not holding.allows(members[0], held):
        return _Nearest(held, ())
    model = holding.spec.model
    start, end, layers = held.start, held.end, len(held)
    ends = (model.embedding_bytes if start == 0 else 0.0) + (model.head_bytes if end == holding.num_layers else 0.0)
    order = []
    for node in members:
        before = current.get(node)
        if before is None:
            size = layers * model.layer_bytes + ends
            order.append((size, node, size))
            continue
        if ends:
            size = load_bytes(model, before, held)
        else:
            size = (layers - max(0, min(end, before.end) - max(start, before.start))) * model.layer_bytes
        # What a node gives up may be worth something at another place: of like costs the one that gives up least.
        given_up = before.end - before.start if size > 0 else 0
        order.append((size + 0.01 * model.layer_bytes * given_up, node, size))
    return _Nearest(held, tuple((node, size) for _, node, size in sorted(order)))
