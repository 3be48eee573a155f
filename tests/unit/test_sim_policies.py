"""Whole runs on small clusters: nothing is lost, nothing is over-committed, the same seed gives the same run."""

from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helixd.config.sections import EngineConfig
from helixd.coordinator import admission as coordinator
from helixd.ids import NodeId
from helixd.plan.cluster.spec import COORDINATOR
from helixd.plan.graph.flow import FlowModel
from helixd.plan.graph.schedule import schedule_of
from helixd.plan.plan import Hop, Plan
from helixd.sim.helixd import CHOOSERS, HelixdPolicy, Simulation
from helixd.sim.job import Job, Request
from helixd.sim.load import Lengths, Load, Offline, Online, Trace
from helixd.sim.meter import Report
from helixd.sim.paper import SCHEDULERS, PaperPolicy
from helixd.sim.paper_schedule import ExpectedKv, FlowDraws, scheduled_flow
from helixd.sim.script import Happening, SimulationStopped
from helixd.sim.stage_node import StepLimits
from helixd.sim.wires import Wire
from helixd.worker import batcher
from tests.unit.sim_worlds import SHORT, four_nodes, placed, timed, world

BUSY = Offline(warmup_s=1.0, measure_s=6.0)


def simulation(
    policy: HelixdPolicy, load: Load, *, script: list[Happening] | None = None, **options: float
) -> Simulation:
    spec, plan = four_nodes(**options)
    return Simulation(policy, spec, plan, load, SHORT, 3, script or [])


def finite(count: int) -> Trace:
    pairs = SHORT.pairs
    return Trace(tuple((0.01 * i, Request(*pairs[i % 3])) for i in range(count)), measure_s=60.0)


@pytest.mark.parametrize("policy", [HelixdPolicy(), HelixdPolicy(feedback=True), PaperPolicy()])
def test_everything_that_is_asked_is_served_to_the_last_token(policy: HelixdPolicy | PaperPolicy) -> None:
    spec, plan = four_nodes(kv=1e6)
    load = finite(30)
    if isinstance(policy, PaperPolicy):
        # Its clock starts when the nodes have loaded.
        load = replace(load, measure_s=60.0)
    report = policy.run(spec, plan, load, SHORT, seed=1)
    assert report.started == report.finished == 30
    assert report.dropped == report.preempted == 0
    assert report.decode_tokens_per_s * report.window_s == pytest.approx(sum(r.output_tokens for _, r in load.requests))
    assert report.prompt_tokens_per_s * report.window_s == pytest.approx(sum(r.input_tokens for _, r in load.requests))
    assert report.ttft_s.count == report.e2e_s.count == 30


@pytest.mark.parametrize("policy", [*(HelixdPolicy(chooser=name) for name in CHOOSERS), HelixdPolicy(feedback=True)])
def test_a_run_repeats_exactly_for_a_seed_and_differs_for_another(policy: HelixdPolicy) -> None:
    spec, plan = four_nodes()
    first, again, other = (policy.run(spec, plan, BUSY, SHORT, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert first.decode_tokens_per_s > 0


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_the_papers_schedulers_repeat_too(scheduler: str) -> None:
    spec, plan = four_nodes(kv=4e4)
    load = replace(BUSY, in_flight=None if scheduler == "max-flow" else 6)
    first, again = (PaperPolicy(scheduler).run(spec, plan, load, SHORT, seed=1) for _ in range(2))
    assert first == again
    assert first.decode_tokens_per_s > 0
    if scheduler != "max-flow":
        assert first.mean_in_flight <= 6


@settings(max_examples=12, deadline=None)
@given(
    st.integers(250, 3000),
    st.sampled_from([16, 64, 256]),
    st.integers(0, 2),
    st.booleans(),
    st.lists(st.tuples(st.floats(0, 3), st.sampled_from("abcd")), max_size=2, unique_by=lambda pair: pair[1]),
)
def test_requests_are_conserved_and_kv_is_never_over_committed(
    kv: int, chunk: int, turns: int, feedback: bool, failures: list[tuple[float, str]]
) -> None:
    policy = HelixdPolicy(StepLimits(8, chunk, turns), feedback=feedback)
    script = [Happening(at, NodeId(node), "fails") for at, node in failures]
    script += [Happening(at + 4.0, NodeId(node), "joins") for at, node in failures]
    run = simulation(policy, Online(2000.0, measure_s=8.0), kv=float(kv), script=script)
    ledger = run.router.ledger
    over: list[float] = []

    def look(_: None) -> None:
        kept: dict[NodeId, int] = {}
        for job, route in run.flying.values():
            for hop in route.hops:
                kept[hop.node] = kept.get(hop.node, 0) + len(hop.layers) * job.tokens
        for node, token_layers in kept.items():
            # A lone sequence may be let in over the mark, never over the room.
            if token_layers > ledger.capacity(node) and len(ledger.holders(node)) > 1:
                over.append(run.world.now_s)
        run.world.at(run.world.now_s + 0.05, look)

    run.world.at(0.0, look)
    report = run.report()
    assert over == []
    asked = run.count - report.dropped
    assert asked == report.finished + len(run.flying) + len(run.queue)
    assert report.started <= asked
    held = {sequence for node in run.nodes for sequence, _ in ledger.holders(node)}
    assert held == set(run.flying)
    for sequence, (job, _) in list(run.flying.items()):
        run.router.release(sequence)
        assert job.emitted < job.request.output_tokens
    assert ledger.total_used() == 0


def test_scarce_kv_preempts_and_still_everything_ends() -> None:
    lengths = Lengths([(20, 60)])
    spec, plan = four_nodes(kv=700.0)
    load = Trace(tuple((0.0, Request(20, 60)) for _ in range(12)), measure_s=120.0)
    # Nothing is known of outputs but the workload's mean of 19 tokens, so too many are let in.
    report = HelixdPolicy(kv_mark=1.0).run(spec, plan, load, lengths)
    assert report.preempted > 0
    assert report.finished == 12


def test_a_lost_node_costs_a_delay_and_no_request() -> None:
    spec, plan = four_nodes(kv=1e6)
    quiet = HelixdPolicy().run(spec, plan, finite(30), SHORT)
    # c goes: whoever came out of a has no way on, those out of b go to d.
    script = [Happening(0.1, NodeId("c"), "fails"), Happening(20.0, NodeId("c"), "joins")]
    report = HelixdPolicy().run(spec, plan, finite(30), SHORT, script=script)
    assert report.recovered > 0
    assert report.finished == report.started == quiet.finished == 30
    assert report.e2e_s.mean > quiet.e2e_s.mean


def test_more_work_is_served_by_more_nodes_and_tokens_wait_longer_under_load() -> None:
    nodes = [timed(name) for name in "abcd"]
    spec = world(nodes)
    one = HelixdPolicy().run(spec, placed(spec, {"a": (0, 4)}), BUSY, SHORT)
    two = HelixdPolicy().run(spec, placed(spec, {"a": (0, 4), "b": (0, 4)}), BUSY, SHORT)
    assert two.decode_tokens_per_s > 1.5 * one.decode_tokens_per_s
    light = HelixdPolicy().run(spec, placed(spec, {"a": (0, 4)}), Online(200.0, measure_s=30.0), SHORT)
    assert light.tpot_s.p50 < one.tpot_s.p50
    assert light.ttft_s.p50 < one.ttft_s.p50


def test_direct_feedback_saves_the_way_over_a_far_coordinator() -> None:
    spec, plan = four_nodes(kv=1e6)
    far = replace(
        spec,
        links=tuple(replace(k, latency_s=0.05) if COORDINATOR in (k.src, k.dst) else k for k in spec.links),
    )
    load = Online(100.0, measure_s=20.0)
    plain, direct = (HelixdPolicy(feedback=f).run(far, plan, load, SHORT) for f in (False, True))
    assert direct.tpot_s.p50 < plain.tpot_s.p50 - 0.09


def test_the_time_of_a_decode_pass_is_told_apart() -> None:
    spec, plan = four_nodes(kv=1e6)
    report = HelixdPolicy().run(spec, plan, Online(100.0, measure_s=30.0), SHORT)
    assert set(report.round_s) == {"compute", "network", "waiting"}
    assert sum(report.round_s.values()) == pytest.approx(report.tpot_s.mean, rel=0.05)
    # Two hops between three links of a millisecond.
    assert report.round_s["network"] == pytest.approx(0.003, rel=0.1)
    for seen in report.nodes.values():
        assert 0 <= seen.prompt <= seen.busy <= 1


def test_a_number_kept_in_flight_is_kept() -> None:
    spec, plan = four_nodes(kv=1e6)
    report = HelixdPolicy().run(spec, plan, replace(BUSY, in_flight=3), SHORT)
    assert 2.5 < report.mean_in_flight <= 3


def test_what_can_never_fit_is_dropped_and_holds_nobody_up() -> None:
    spec, plan = four_nodes(kv=400.0)
    load = Trace(((0.0, Request(500, 5)), (0.0, Request(20, 5))), measure_s=10.0)
    report = HelixdPolicy().run(spec, plan, load, SHORT)
    assert (report.dropped, report.finished) == (1, 1)


@pytest.mark.parametrize("kv", [0.0, 1.0, 200.0])
def test_where_no_request_fits_at_all_a_run_of_as_many_as_fit_ends_and_says_so(kv: float) -> None:
    spec, plan = four_nodes(kv=kv)
    lengths = Lengths([(500, 5), (200, 5)])
    with pytest.raises(SimulationStopped, match=r"no request fits: .* prompt of 200 tokens"):
        HelixdPolicy().run(spec, plan, BUSY, lengths)
    report = HelixdPolicy().run(spec, plan, Online(500.0, measure_s=10.0), lengths)
    assert report.dropped > 0
    assert report.started == 0


def test_one_length_that_fits_among_many_that_do_not_is_served() -> None:
    spec, plan = four_nodes(kv=400.0)
    report = HelixdPolicy().run(spec, plan, replace(BUSY, measure_s=5.0), Lengths([(500, 5)] * 50 + [(20, 5)]))
    assert report.finished > 0
    assert report.dropped > report.finished


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_nodes_without_any_room_serve_nothing_in_the_paper_s_simulator(scheduler: str) -> None:
    spec, plan = four_nodes(kv=0.0)
    report = PaperPolicy(scheduler).run(spec, plan, Offline(warmup_s=0.0, measure_s=5.0), SHORT)
    assert all(seen.kv_peak == 1.0 for name, seen in report.nodes.items() if name in plan.placement)


def test_the_paper_ends_online_runs_without_room_and_drops_offline() -> None:
    spec, plan = four_nodes(kv=700.0)
    with pytest.raises(SimulationStopped, match="no pipeline with room"):
        PaperPolicy().run(spec, plan, Online(5000.0, measure_s=20.0), SHORT)
    spec, _ = four_nodes(kv=3000.0)
    lone = placed(spec, {"a": (0, 4)})
    report = PaperPolicy().run(spec, lone, Offline(warmup_s=0.0, measure_s=20.0), Lengths([(500, 3), (10, 5)]))
    assert report.dropped > 0
    assert report.finished > 0


def test_names_that_nobody_knows_are_refused() -> None:
    spec, plan = four_nodes()
    with pytest.raises(ValueError, match="none of"):
        HelixdPolicy(chooser="best").run(spec, plan, BUSY, SHORT)
    with pytest.raises(ValueError, match="none of"):
        PaperPolicy("best").run(spec, plan, BUSY, SHORT)


def test_the_papers_links_and_flow_limit_what_its_scheduler_may_use() -> None:
    """A hop with less than 5 % of its vertex's flow is never taken by the paper's scheduler."""
    nodes = [timed("a", kv=1e6), timed("b", kv=1e6), timed("c", kv=1e6, speed=0.01)]
    spec = world(nodes)
    plan = placed(spec, {"a": (0, 2), "b": (2, 4), "c": (2, 4)})
    report = PaperPolicy().run(spec, plan, replace(BUSY, in_flight=4), SHORT)
    assert report.nodes[NodeId("c")].batches == 0
    assert report.nodes[NodeId("b")].batches > 0
    swarm = PaperPolicy("random").run(spec, plan, replace(BUSY, in_flight=4), SHORT)
    assert swarm.nodes[NodeId("c")].batches > 0


def test_schedules_without_flow_serve_other_choosers() -> None:
    spec, plan = four_nodes(kv=1e6)
    hops: dict[NodeId, list[Hop]] = {}
    for src, dst in FlowModel(spec).edges(plan.placement):
        hops.setdefault(src, []).append(Hop(dst, 1.0))
    every = replace(plan, schedule={src: tuple(found) for src, found in hops.items()})
    for chooser in CHOOSERS:
        report: Report = HelixdPolicy(chooser=chooser).run(spec, every, finite(12), SHORT)
        assert report.finished == 12


def test_a_plan_and_its_schedules_are_all_that_is_used() -> None:
    spec, plan = four_nodes(kv=1e6)
    flow = FlowModel(spec).solve({NodeId("b"): plan.placement[NodeId("b")], NodeId("d"): plan.placement[NodeId("d")]})
    narrow = Plan(4, plan.placement, schedule_of(flow), flow.value)
    report = HelixdPolicy().run(spec, narrow, finite(10), SHORT)
    assert report.finished == 10
    assert report.nodes[NodeId("a")].batches == report.nodes[NodeId("c")].batches == 0


def test_the_policy_counts_kv_in_the_pages_and_goes_by_the_options_of_the_daemon() -> None:
    """What is written down twice, because the simulator may not know the coordinator."""
    assert HelixdPolicy().kv_page_tokens == coordinator.KV_PAGE_TOKENS
    assert HelixdPolicy().limits.prefill_turns == batcher.PREFILL_TURNS
    assert HelixdPolicy().limits.chunk_tokens == EngineConfig().prefill_chunk_tokens
    assert HelixdPolicy().frames


def test_an_unknown_flow_is_refused() -> None:
    spec, plan = four_nodes()
    with pytest.raises(ValueError, match="flow 'best' is none of even, paths, preflow"):
        PaperPolicy(flow="best").run(spec, plan, BUSY, SHORT)


@pytest.mark.parametrize("flow", ["paths", "preflow"])
def test_the_papers_scheduler_serves_by_any_max_flow(flow: str) -> None:
    spec, plan = four_nodes(kv=4e4)
    assert PaperPolicy(flow=flow).run(spec, plan, BUSY, SHORT).decode_tokens_per_s > 0


def test_the_fullest_layer_counts_all_nodes_that_hold_it_by_their_room_for_one_layer() -> None:
    spec = world([timed("a", kv=1000.0), timed("b", kv=3000.0), timed("c", kv=9000.0)])
    placement = placed(spec, {"a": (0, 2), "b": (0, 3), "c": (2, 4)}).placement
    kv = ExpectedKv(spec, placement, offline=True)
    job = Job(1, Request(10, 10), 0.0, 10)
    kv.reserve(job, [(NodeId("a"), 2), (NodeId("c"), 2)], 400)
    # Layers 0 and 1: room for 500 + 1000 tokens, 400 expected. Layer 2: 1000 + 4500. Layer 3: 4500.
    assert kv.fullest() == pytest.approx(400 / 1500)
    kv.release(job)
    # One layer of three on b counts for a third of a sequence in each.
    kv.reserve(job, [(NodeId("b"), 1)], 900)
    assert kv.fullest() == pytest.approx(300 / 1500)


def test_who_finds_no_room_on_the_way_leaves_no_work_behind_for_the_draws() -> None:
    spec = world([timed("a", kv=1e6), timed("b", kv=1e6), timed("c", kv=2000.0)])
    placement = placed(spec, {"a": (0, 2), "b": (0, 2), "c": (2, 4)}).placement
    edges = [(COORDINATOR, "a"), (COORDINATOR, "b"), ("a", "c"), ("b", "c"), ("c", COORDINATOR)]
    wires = {(NodeId(src), NodeId(dst)): cast(Wire, SimpleNamespace(src=src, dst=dst)) for src, dst in edges}
    flow = scheduled_flow(spec, placement, kind="even")
    draws = FlowDraws(spec, placement, flow, ExpectedKv(spec, placement, offline=True), wires)

    def first(number: int, rows: int) -> str | None:
        route = draws.draw(Job(number, Request(rows, 10), 0.0, rows))
        return route and str(route[0].dst)

    assert first(1, 10) == "a"
    assert first(2, 400) is None
    assert first(3, 10) == "b"
    assert first(4, 10) == "a"
