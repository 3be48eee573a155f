"""What holds of every plan, whichever way it was made: valid, its flow a true maximum, never above the bound."""

import itertools
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helixd.ids import NodeId
from helixd.layers import LayerRange
from helixd.plan.cluster.spec import COORDINATOR, ClusterSpec, LinkSpec, NodeSpec
from helixd.plan.frontier import frontier
from helixd.plan.graph.flow import FlowModel
from helixd.plan.holding import Holding
from helixd.plan.plan import Infeasible
from helixd.plan.planner import plan_cluster
from helixd.plan.replan import replan
from helixd.plan.search.chains import pipelines
from helixd.plan.search.exhaustive import best_of_all
from helixd.plan.search.methods import Search
from helixd.plan.search.repair import improve
from tests.unit.plan_worlds import cluster, full_mesh, node

SOURCE, SINK = "source", "sink"


def max_flow(spec: ClusterSpec, placement: Mapping[NodeId, LayerRange]) -> float:
    """Shortest augmenting paths on the graph as the paper draws it: nothing shared with the code under test."""
    model = spec.model
    room: dict[tuple[str, str], float] = {}
    for n in spec.nodes:
        if n.id in placement:
            rate = n.profile.throughput_tokens_per_s[len(placement[n.id]) - 1]
            nics = [nic for nic in (n.nic_in_bytes_per_s, n.nic_out_bytes_per_s) if nic is not None]
            room[f"{n.id}>", f">{n.id}"] = min([rate, *(nic / model.activation_bytes for nic in nics)])
    for link in spec.links:
        if link.src == COORDINATOR:
            if link.dst in placement and placement[link.dst].start == 0:
                room[SOURCE, f"{link.dst}>"] = link.bandwidth_bytes_per_s / model.token_bytes
        elif link.dst == COORDINATOR:
            if link.src in placement and placement[link.src].end == model.num_layers:
                room[f">{link.src}", SINK] = link.bandwidth_bytes_per_s / model.token_bytes
        elif link.src in placement and link.dst in placement:
            here, there = placement[link.src], placement[link.dst]
            if there.start <= here.end < there.end:
                room[f">{link.src}", f"{link.dst}>"] = link.bandwidth_bytes_per_s / model.activation_bytes
    total = 0.0
    while True:
        came: dict[str, str] = {SOURCE: SOURCE}
        queue = deque((SOURCE,))
        while queue and SINK not in came:
            at = queue.popleft()
            for (tail, head), left in room.items():
                if tail == at and head not in came and left > 1e-9:
                    came[head] = tail
                    queue.append(head)
        if SINK not in came:
            return total
        path = [SINK]
        while path[-1] != SOURCE:
            path.append(came[path[-1]])
        steps = list(itertools.pairwise(reversed(path)))
        pushed = min(room[step] for step in steps)
        total += pushed
        for tail, head in steps:
            room[tail, head] -= pushed
            room[head, tail] = room.get((head, tail), 0.0) + pushed


def better_than(spec: ClusterSpec, flow: float) -> dict[NodeId, LayerRange] | None:
    """A placement that carries more than `flow`, by looking at all that cover every layer with so much."""
    holding = Holding(spec)
    options: list[list[LayerRange | None]] = []
    names = [n.id for n in holding.usable()]
    for name in names:
        options.append([*holding.options(name)] + ([] if holding.must_hold(name) else [None]))
    rates = {n.id: n.profile.throughput_tokens_per_s for n in spec.nodes}
    most = {
        n: max((rates[n][len(r) - 1] for r in opts if r), default=0.0) for n, opts in zip(names, options, strict=True)
    }
    later = [sum(most[n] for n in names[i:]) for i in range(len(names) + 1)]
    least = flow * (1 + 1e-6) + 1e-6

    def search(at: int, cover: list[float], placed: dict[NodeId, LayerRange]) -> Iterator[dict[NodeId, LayerRange]]:
        if min(cover) + later[at] < least:
            return
        if at == len(names):
            if max_flow(spec, placed) >= least:
                yield placed
            return
        for held in options[at]:
            if held is None:
                yield from search(at + 1, cover, placed)
                continue
            rate = rates[names[at]][len(held) - 1]
            more = [c + rate if layer in held else c for layer, c in enumerate(cover)]
            yield from search(at + 1, more, placed | {names[at]: held})

    return next(search(0, [0.0] * spec.model.num_layers, {}), None)


@st.composite
def clusters(
    draw: st.DrawFn, nodes: tuple[int, int] = (1, 6), layers: tuple[int, int] = (1, 6), pins: bool = True
) -> ClusterSpec:
    """Anything that a user may have: odd T(j), nodes too small for a layer, links missing, thin or one way, pins."""
    num_layers = draw(st.integers(*layers))
    made: list[NodeSpec] = []
    for i in range(draw(st.integers(*nodes))):
        most = draw(st.integers(0, num_layers))
        rates = st.lists(st.sampled_from([3.0, 8.0, 20.0, 21.0, 50.0]), min_size=most, max_size=most)
        one = node(f"n{i}", draw(rates))
        if pins and most and draw(st.integers(0, 5)) == 0:
            start = draw(st.integers(0, num_layers - 1))
            one = draw(
                st.sampled_from(
                    [
                        replace(one, exclude=True),
                        replace(one, max_layers=1),
                        replace(one, min_layers=most),
                        replace(one, fixed_range=LayerRange(start, min(num_layers, start + most))),
                    ]
                )
            )
        made.append(one)
    kept = draw(st.sampled_from([10, 7, 4]))
    links = tuple(
        replace(link, bandwidth_bytes_per_s=draw(st.sampled_from([0.0, 5e3, 2e4, 1e9, 1e9])))
        for link in full_mesh(made)
        if draw(st.integers(0, 9)) < kept
    )
    return cluster(made, num_layers, links)


def check(spec: ClusterSpec, placement: Mapping[NodeId, LayerRange], flow: float, bound: float) -> None:
    holding = Holding(spec)
    for n in spec.nodes:
        held = placement.get(n.id)
        if held is None:
            assert not holding.must_hold(n.id)
            continue
        assert held.end <= spec.model.num_layers
        assert len(held) <= n.profile.max_layers
        assert not n.exclude
        assert n.fixed_range in (None, held)
        assert (n.min_layers or 1) <= len(held) <= (n.max_layers or len(held))
    assert 0 < flow == pytest.approx(max_flow(spec, placement), rel=1e-6, abs=1e-6)
    assert flow <= bound * (1 + 1e-6)


@settings(max_examples=25, deadline=None)
@given(clusters())
def test_every_candidate_is_valid_its_flow_a_maximum_and_within_the_bound(spec: ClusterSpec) -> None:
    try:
        holding = Holding(spec)
    except Infeasible:
        return
    search = Search(
        holding, seed=0, effort_s=0.05, out_of_time=lambda: False, frontier=True, widths=(1, 2)
    )  # fmt: skip
    for found in search.run():
        check(spec, found.placement, found.flow.value, search.bound)
    chains = pipelines(holding, FlowModel(spec))
    if chains and not any(holding.must_hold(n.id) for n in spec.nodes):
        check(spec, chains, FlowModel(spec).value(chains), search.bound)
        better, flow = improve(holding, FlowModel(spec), chains, evaluations=50)
        check(spec, better, flow, search.bound)
        assert flow >= FlowModel(spec).value(chains)
    for depth in frontier(holding, steps=3):
        assert all(holding.allows(n, held) for n, held in depth.placement.items())
        assert {layer for held in depth.placement.values() for layer in held.layers()} == set(range(holding.num_layers))


@settings(max_examples=12, deadline=None)
@given(clusters(nodes=(2, 5)), st.sampled_from(["throughput", "max-flow", "latency"]), st.integers(0, 3))
def test_every_plan_is_valid_and_the_same_for_a_seed(spec: ClusterSpec, objective: str, seed: int) -> None:
    try:
        plan = plan_cluster(spec, objective=objective, seed=seed, time_limit_s=0.05)
    except Infeasible:
        return
    assert plan.upper_bound_tokens_per_s is not None
    check(spec, plan.placement, plan.max_flow_tokens_per_s, plan.upper_bound_tokens_per_s)
    assert plan == plan_cluster(spec, objective=objective, seed=seed, time_limit_s=0.05)
    again = replan(spec, current=plan.placement, load_bytes_per_s=1e6, objective="max-flow", time_limit_s=0.05)
    check(spec, again.plan.placement, again.plan.max_flow_tokens_per_s, again.plan.upper_bound_tokens_per_s or 0.0)


@settings(max_examples=25, deadline=None)
@given(clusters(nodes=(2, 4), layers=(3, 6)))
def test_no_placement_of_a_small_cluster_beats_the_plan(spec: ClusterSpec) -> None:
    try:
        plan = plan_cluster(spec, objective="max-flow", time_limit_s=0.05)
    except Infeasible:
        flow = 0.0
        try:
            holding = Holding(spec)
        except Infeasible:
            return
        assert best_of_all(holding, FlowModel(spec)) in (None, ({}, True))
    else:
        flow = plan.max_flow_tokens_per_s
        assert plan.upper_bound_tokens_per_s == pytest.approx(flow)
    assert better_than(spec, flow) is None


CURVES = ((10.0,), (10.0, 4.0, 3.0), (2.0, 9.0, 5.0))


@pytest.mark.parametrize("curves", list(itertools.combinations_with_replacement(CURVES, 2)))
def test_two_nodes_three_layers_and_every_set_of_links(curves: tuple[tuple[float, ...], ...]) -> None:
    nodes = [node(f"n{i}", curve) for i, curve in enumerate(curves)]
    ways = [(a, b) for a, b in itertools.permutations([COORDINATOR, *(n.id for n in nodes)], 2)]
    for there in itertools.product((0.0, 1e9), repeat=len(ways)):
        # One link between nodes is thin, so that it may bind.
        links = tuple(
            LinkSpec(a, b, min(speed, 3e3) if (a, b) == ("n0", "n1") else speed, 0.001)
            for (a, b), speed in zip(ways, there, strict=True)
        )
        spec = cluster(nodes, 3, links)
        try:
            flow = plan_cluster(spec, objective="max-flow", time_limit_s=0.01).max_flow_tokens_per_s
        except Infeasible:
            flow = 0.0
        assert better_than(spec, flow) is None, there


def test_a_hub_that_sees_a_dozen_others_each_way() -> None:
    """Fourteen nodes on a ring of one-way links, each seeing the next few only."""
    nodes = [node(f"n{i:02}", [300.0, 150.0, 100.0]) for i in range(14)]
    ends = [n.id for n in nodes]
    links = [LinkSpec(ends[i], ends[(i + step) % 14], 1e9, 0.01) for i in range(14) for step in (1, 2, 3)]
    links += [LinkSpec(COORDINATOR, ends[0], 1e9, 0.01), LinkSpec(COORDINATOR, ends[1], 1e9, 0.01)]
    links += [LinkSpec(ends[12], COORDINATOR, 1e9, 0.01), LinkSpec(ends[13], COORDINATOR, 1e9, 0.01)]
    spec = cluster(nodes, 14, tuple(links))
    plan = plan_cluster(spec, objective="max-flow", time_limit_s=2)
    check(spec, plan.placement, plan.max_flow_tokens_per_s, plan.upper_bound_tokens_per_s or 0.0)
    assert plan.max_flow_tokens_per_s >= 200
