from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helixd.errors import NoRoute
from helixd.ids import Attempt, NodeId, SequenceId
from helixd.layers import LayerRange
from helixd.plan.cluster.spec import COORDINATOR
from helixd.plan.plan import Hop, Plan
from helixd.route.choosers import FlowShares
from helixd.route.ledger import KvLedger
from helixd.route.router import Route, Router

SOURCE = str(COORDINATOR)


def plan_of(num_layers: int, placement: dict[str, tuple[int, int]], schedule: dict[str, dict[str, float]]) -> Plan:
    return Plan(
        num_layers=num_layers,
        placement={NodeId(n): LayerRange(*pair) for n, pair in placement.items()},
        schedule={
            NodeId(v): tuple(Hop(NodeId(n), w) for n, w in sorted(hops.items(), key=lambda hop: -hop[1]))
            for v, hops in schedule.items()
        },
        max_flow_tokens_per_s=sum(schedule[SOURCE].values()),
    )


def two_by_three() -> Plan:
    """Three stages of two nodes, every node of a stage feeding both of the next."""
    stages = [("a0", "a1"), ("b0", "b1"), ("c0", "c1")]
    placement = {n: (4 * i, 4 * i + 4) for i, names in enumerate(stages) for n in names}
    schedule = {SOURCE: {"a0": 10.0, "a1": 10.0}}
    for here, there in pairwise(stages):
        schedule |= {n: dict.fromkeys(there, 5.0) for n in here}
    schedule |= {n: {SOURCE: 10.0} for n in stages[-1]}
    return plan_of(12, placement, schedule)


def roomy(plan: Plan, room: int = 10**9, **options: Any) -> Router:
    return Router(plan, dict.fromkeys(plan.placement, room), **options)


def nodes(*names: str) -> frozenset[NodeId]:
    return frozenset(NodeId(name) for name in names)


def check(route: Route, num_layers: int) -> None:
    """A route's hops are all layers, once, in order."""
    end = 0
    for hop in route.hops:
        assert hop.layers.start == end
        end = hop.layers.end
    assert end == num_layers


def test_draws_follow_the_flow_and_charge_kv_for_the_layers_used() -> None:
    router = roomy(two_by_three())
    first = router.draw(SequenceId(1), 100, 20)
    second = router.draw(SequenceId(2), 100, 20)
    check(first, 12)
    check(second, 12)
    assert not set(first.nodes) & set(second.nodes)
    assert {router.ledger.used(n) for n in first.nodes} == {4 * 120}
    assert router.release(SequenceId(1), first.nodes[0]) == 480
    assert router.release(SequenceId(1), first.nodes[0]) == 0
    assert router.release(SequenceId(1)) == 960
    assert router.release(SequenceId(2)) == 3 * 480
    assert router.ledger.total_used() == 0


def test_partial_inference_enters_where_the_hop_before_ended() -> None:
    plan = plan_of(
        6,
        {"a": (0, 2), "b": (0, 4), "c": (1, 6)},
        {SOURCE: {"a": 1.0, "b": 1.0}, "a": {"c": 1.0}, "b": {"c": 1.0}, "c": {SOURCE: 2.0}},
    )
    router = roomy(plan)
    routes = [router.draw(SequenceId(i), 10, 0) for i in range(2)]
    assert {str(route) for route in routes} == {"a[0, 2) -> c[2, 6)", "b[0, 4) -> c[4, 6)"}
    assert router.ledger.used(NodeId("c")) == 10 * (4 + 2)
    assert routes[0].links[0][0] == routes[0].links[-1][1] == COORDINATOR


def test_a_mask_never_strands_a_sequence_while_another_path_exists() -> None:
    # From a only b, from b only dead c; the way out is through the lighter d.
    plan = plan_of(
        3,
        {"a": (0, 1), "b": (1, 2), "c": (2, 3), "d": (0, 1), "e": (1, 3)},
        {
            SOURCE: {"a": 99.0, "d": 1.0},
            "a": {"b": 99.0},
            "b": {"c": 99.0},
            "c": {SOURCE: 99.0},
            "d": {"e": 1.0},
            "e": {SOURCE: 1.0},
        },
    )
    router = roomy(plan)
    for i in range(10):
        assert router.draw(SequenceId(i), 1, 1, masked_nodes=nodes("c")).nodes == ("d", "e")
    cut = frozenset({(NodeId("b"), NodeId("c"))})
    assert router.draw(SequenceId(10), 1, 1, masked_links=cut).nodes == ("d", "e")
    assert router.has_pipeline(masked_links=cut)
    assert not router.has_pipeline(masked_nodes=nodes("c", "e"))


def test_reasons_tell_waiting_from_hopeless() -> None:
    plan = two_by_three()
    router = roomy(plan, room=4 * 100)
    with pytest.raises(NoRoute) as masked:
        router.draw(SequenceId(1), 10, 10, masked_nodes=nodes("b0", "b1"))
    assert masked.value.cause == "topology"
    assert router.fits_when_empty(99)
    assert not router.fits_when_empty(100)
    with pytest.raises(NoRoute) as large:
        router.draw(SequenceId(1), 100, 10)
    assert large.value.cause == "topology"
    assert "KV" in large.value.reason
    router.draw(SequenceId(1), 99, 1)
    router.draw(SequenceId(2), 99, 1)
    before = router.ledger.total_used()
    with pytest.raises(NoRoute) as full:
        router.draw(SequenceId(3), 1, 1)
    assert full.value.cause == "kv"
    assert router.ledger.total_used() == before
    router.release(SequenceId(1))
    router.draw(SequenceId(3), 1, 1)


def test_an_expectation_beyond_any_node_does_not_make_a_sequence_unservable() -> None:
    router = roomy(two_by_three(), room=4 * 100)
    route = router.draw(SequenceId(1), 50, 5000)
    assert {router.ledger.used(n) for n in route.nodes} == {400}


def test_attempts_hold_their_kv_apart() -> None:
    router = roomy(two_by_three())
    old = router.draw(SequenceId(1), 10, 0, masked_nodes=nodes("a1", "b1", "c1"))
    new = router.draw(SequenceId(1), 10, 0, attempt=Attempt(1), masked_nodes=nodes("a1", "b0", "c1"))
    assert old.nodes == ("a0", "b0", "c0")
    assert new.nodes == ("a0", "b1", "c0")
    assert router.ledger.used(NodeId("a0")) == 80
    assert router.release(SequenceId(1), attempt=Attempt(0)) == 120
    assert router.ledger.nodes_of(SequenceId(1)) == ("a0", "b1", "c0")
    assert router.release(SequenceId(1), attempt=Attempt(1)) == 120


def test_decode_load_moves_later_draws_elsewhere() -> None:
    plan = two_by_three()
    router = roomy(plan, chooser=FlowShares(plan.schedule, COORDINATOR))
    busy = router.draw(SequenceId(0), 10, 0)
    router.count_decode(busy, 30)
    for i in range(1, 5):
        assert router.draw(SequenceId(i), 10, 0).nodes[0] != busy.nodes[0]
    assert router.draw(SequenceId(5), 10, 0).nodes[0] == busy.nodes[0]


def test_the_ledger_outlives_the_router() -> None:
    plan = two_by_three()
    ledger = KvLedger({})
    old = Router(plan, dict.fromkeys(plan.placement, 1000), ledger=ledger)
    old.draw(SequenceId(1), 10, 0)
    new = Router(plan, dict.fromkeys(plan.placement, 1000), ledger=ledger)
    assert new.ledger.total_used() == 120
    assert new.release(SequenceId(1)) == 120


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_draws_find_every_admissible_path_and_leak_nothing(data: st.DataObject) -> None:
    count, num_layers = data.draw(st.integers(2, 7)), data.draw(st.integers(1, 5))
    names = [f"n{i}" for i in range(count)]
    placement = {}
    for name in names:
        start = data.draw(st.integers(0, num_layers - 1))
        placement[name] = (start, data.draw(st.integers(start + 1, num_layers)))
    schedule: dict[str, dict[str, float]] = {SOURCE: {n: 1.0 for n in names if placement[n][0] == 0}}
    for name in names:
        end = placement[name][1]
        onward = [o for o in names if placement[o][0] <= end < placement[o][1]]
        hops = [SOURCE] if end == num_layers else [o for o in onward if data.draw(st.booleans())]
        if hops:
            schedule[name] = {hop: data.draw(st.floats(0.1, 10)) for hop in hops}
    plan = plan_of(num_layers, placement, schedule)
    room = {NodeId(n): data.draw(st.integers(0, 60)) for n in names}
    router = Router(plan, room, high_water=1.0)
    masked = frozenset(NodeId(n) for n in names if not data.draw(st.integers(0, 4)))

    def paths(vertex: str, entry: int) -> bool:
        for hop in plan.schedule.get(NodeId(vertex), ()):
            if hop.node == SOURCE:
                return True
            end = placement[hop.node][1]
            need = (end - entry) * 10
            if (
                hop.node not in masked
                and router.ledger.used(hop.node) + need <= room[hop.node]
                and paths(hop.node, end)
            ):
                return True
        return False

    drawn = []
    for i in range(6):
        possible = paths(SOURCE, 0)
        try:
            route = router.draw(SequenceId(i), 9, 1, masked_nodes=masked)
        except NoRoute:
            assert not possible
            continue
        assert possible
        check(route, num_layers)
        assert not set(route.nodes) & masked
        drawn.append(SequenceId(i))
        assert all(router.ledger.used(n) <= room[n] for n in room)
    for sequence in drawn:
        assert router.release(sequence) == 10 * num_layers
    assert router.ledger.total_used() == 0


LIFE = st.lists(
    st.tuples(
        st.sampled_from(["draw", "again", "prefilled", "decode", "grow", "release", "lost"]),
        st.integers(0, 5), st.integers(1, 40), st.sets(st.sampled_from(["a0", "a1", "b0", "b1", "c0", "c1"])),
    ),
    max_size=50,
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(LIFE)
def test_whatever_happens_to_sequences_nothing_is_over_committed_and_nothing_leaks(
    steps: list[tuple[str, int, int, set[str]]],
) -> None:
    """Draws under masks, attempts beside one another, growth, releases in any order, nodes that lose all they have."""
    plan, room = two_by_three(), 4 * 100
    router = Router(plan, dict.fromkeys(plan.placement, room), high_water=0.8, prefill_limit_tokens=100)
    attempts: dict[SequenceId, dict[int, Route]] = {}
    for what, who, tokens, down in steps:
        sequence = SequenceId(who)
        known = attempts.setdefault(sequence, {})
        latest = max(known, default=0)
        if what in ("draw", "again") and (not known or what == "again"):
            before = {node: router.ledger.used(node) for node in plan.placement}
            try:
                route = router.draw(sequence, tokens, 5, attempt=Attempt(latest + 1), masked_nodes=nodes(*down))
            except NoRoute:
                assert before == {node: router.ledger.used(node) for node in plan.placement}
                continue
            check(route, 12)
            assert not down & set(route.nodes)
            for node in route.nodes:
                alone = before[node] == 0
                assert router.ledger.used(node) <= (room if alone else max(room * 0.8, before[node]))
            known[latest + 1] = route
        elif what == "prefilled" and known:
            router.prefilled(sequence, Attempt(latest))
        elif what == "decode" and known:
            router.count_decode(known[latest], tokens)
        elif what == "grow" and known:
            over = router.ledger.grow(sequence, tokens, attempt=Attempt(latest))
            assert set(over) == set(router.ledger.over()) & set(router.ledger.nodes_of(sequence, Attempt(latest)))
        elif what == "release" and known:
            router.release(sequence, attempt=Attempt(min(known)))
            del known[min(known)]
        elif what == "lost" and down:
            router.ledger.forget_node(NodeId(min(down)))
            assert router.ledger.used(NodeId(min(down))) == 0
    for sequence, known in attempts.items():
        for attempt in known:
            router.release(sequence, attempt=Attempt(attempt))
    assert router.ledger.total_used() == 0
    assert not router.ledger.over()
    # Nobody is in prefill any more either: two that fill the limit go at once.
    router.draw(SequenceId(98), 50, 0)
    router.draw(SequenceId(99), 50, 0)
