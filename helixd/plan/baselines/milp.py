"""The paper's mixed-integer program, as published (Helix, arXiv 2406.01566, section 4), on HiGHS.

Per node: the first layer, and one binary per number of layers held. Per edge: the flow, and whether it is valid,
which big-M rows tie to the ranges (partial inference allowed). Its bound is weak, so it is for small clusters: here it
is something to compare with, and a cross-check of the other methods.
"""

from helixd.ids import NodeId
from helixd.layers import LayerRange
from helixd.plan.baselines.layout import Layout
from helixd.plan.cluster.spec import COORDINATOR
from helixd.plan.graph.flow import FlowModel, node_capacity
from helixd.plan.holding import Holding
from helixd.plan.milp import Program, solve
from helixd.plan.plan import Infeasible

MAX_NODES = 12


def place(holding: Holding, seed: int, time_limit_s: float) -> Layout:
    """The best placement within the time. Raises Infeasible if there is none or the cluster is too large."""
    spec, num_layers = holding.spec, holding.num_layers
    nodes = [node for node in holding.usable() if holding.options(node.id)]
    if len(nodes) > MAX_NODES:
        raise Infeasible(
            f"{len(nodes)} nodes are too many for the paper's program, which is taken for {MAX_NODES} at most: beyond "
            "that HiGHS finds no plan with any flow in ten minutes"
        )
    flows = FlowModel(spec)
    program = Program()
    start: dict[NodeId, int] = {}
    holds: dict[NodeId, list[tuple[int, int]]] = {}
    for node in nodes:
        spans = holding.options(node.id)
        fixed = node.fixed_range
        first = fixed.start if fixed else 0
        start[node.id] = program.column(0.0, lower=first, upper=fixed.start if fixed else num_layers - 1, integer=True)
        lengths = sorted({len(span) for span in spans})
        holds[node.id] = [(n, program.column(0.0, upper=1.0, integer=True)) for n in lengths]
        columns = [column for _, column in holds[node.id]]
        program.row(columns, [1.0] * len(columns), lower=float(holding.must_hold(node.id)), upper=1.0)
        program.row(
            [start[node.id], *columns], [1.0, *(float(n) for n, _ in holds[node.id])], upper=float(num_layers)
        )  # fmt: skip
    inflow: dict[NodeId, list[int]] = {node.id: [] for node in nodes}
    outflow: dict[NodeId, list[int]] = {node.id: [] for node in nodes}

    def end_terms(node: NodeId) -> tuple[list[int], list[float]]:
        return [start[node], *(c for _, c in holds[node])], [1.0, *(float(n) for n, _ in holds[node])]

    def edge(src: NodeId, dst: NodeId) -> tuple[int, int] | None:
        room = flows.link_capacity(src, dst)
        for end in (src, dst):
            if end != COORDINATOR:
                most = max(node_capacity(spec, holding.node(end), n) for n, _ in holds[end])
                room = min(room, most)
        if room <= 0:
            return None
        flow = program.column(-1.0 if src == COORDINATOR else 0.0, upper=room)
        valid = program.column(0.0, upper=1.0, integer=True)
        program.row([flow, valid], [1.0, -room], upper=0.0)
        if src != COORDINATOR:
            outflow[src].append(flow)
        if dst != COORDINATOR:
            inflow[dst].append(flow)
        return flow, valid

    big = float(num_layers)
    for node in nodes:
        if (found := edge(COORDINATOR, node.id)) is not None:
            program.row([start[node.id], found[1]], [1.0, big], upper=big)
        if (found := edge(node.id, COORDINATOR)) is not None:
            ends, ones = end_terms(node.id)
            program.row([*ends, found[1]], [*ones, -big], lower=0.0)
        for other in nodes:
            if other is node or (found := edge(node.id, other.id)) is None:
                continue
            ends, lengths_of = end_terms(node.id)
            other_ends, other_lengths = end_terms(other.id)
            # start of the next <= end of this < end of the next, where the edge is valid.
            program.row([start[other.id], *ends, found[1]], [1.0, *(-v for v in lengths_of), big], upper=big)
            program.row(
                [*ends, *other_ends, found[1]], [*lengths_of, *(-v for v in other_lengths), big + 1], upper=big
            )  # fmt: skip
    for node in nodes:
        into, out = inflow[node.id], outflow[node.id]
        program.row([*into, *out], [1.0] * len(into) + [-1.0] * len(out), lower=0.0, upper=0.0)
        sizes = holds[node.id]
        rates = [-node_capacity(spec, node, n) for n, _ in sizes]
        program.row([*into, *(c for _, c in sizes)], [1.0] * len(into) + rates, upper=0.0)
    found_best = solve(program, time_limit_s=time_limit_s, seed=seed)
    values = found_best.values if found_best is not None else ()
    placement: dict[NodeId, LayerRange] = {}
    for node in nodes if values else []:
        layers = next((n for n, column in holds[node.id] if values[column] > 0.5), 0)
        if layers:
            first = round(values[start[node.id]])
            placement[node.id] = LayerRange(first, first + layers)
    # Within its tolerances a solver may call an edge valid by a millionth: what counts is the true flow.
    if flows.value(placement) <= 0:
        raise Infeasible(f"HiGHS found no placement that carries anything within {time_limit_s:g} s")
    return Layout(placement)
