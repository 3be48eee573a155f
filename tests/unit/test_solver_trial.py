"""Plans run for a while in simulated time, to choose one: what that says, and how it ends when time is up."""

import asyncio
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from helixd.plan.cluster.clusterfile import parse_cluster
from helixd.plan.cluster.spec import ClusterSpec
from helixd.plan.holding import Holding
from helixd.plan.judge import judged
from helixd.plan.plan import Plan
from helixd.plan.predict import Prediction
from helixd.sim.helixd import HelixdPolicy
from helixd.sim.load import Offline
from helixd.solver.job import Doing, Job
from helixd.solver.process import Outcome, solve
from helixd.solver.trial import Allowance, Simulations
from tests.unit.plan_worlds import ranges
from tests.unit.test_command_simulate import CLUSTER
from tests.unit.test_solver_limits import children

SPEC = parse_cluster(CLUSTER)


def plan(placement: dict[str, tuple[int, int]]) -> Plan:
    return judged(Holding(SPEC), ranges(placement), method="test")


SLOW = Prediction(decode_tokens_per_s=100.0, in_flight=10.0, round_s=0.05, unloaded_round_s=0.02)
THREE = plan({"a": (0, 2), "b": (2, 4), "c": (2, 4)})


def test_more_nodes_serve_more_and_the_same_seed_the_same() -> None:
    def served(which: Plan, seed: int = 0) -> float:
        found = Simulations(SPEC, seed=seed, out_of_time=lambda share: False).run(which, SLOW)
        assert found is not None
        return found

    assert served(THREE) > served(plan({"a": (0, 4)})) > 0
    assert served(THREE) == served(THREE)
    assert served(THREE, 1) != served(THREE)


@pytest.mark.parametrize(
    ("predicted", "window_s"),
    [
        (SLOW, 3 * 20 * 0.05),
        (replace(SLOW, decode_tokens_per_s=100_000.0), 1.0),
        (replace(SLOW, decode_tokens_per_s=1_000_000.0), 20 * 0.02),
    ],
)
def test_the_window_holds_some_requests_unless_that_is_too_much(
    predicted: Prediction, window_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[Offline] = []

    class Stop(Exception):
        pass

    def run(self: HelixdPolicy, spec: object, plan: object, load: Offline, *rest: object, **named: object) -> None:
        loads.append(load)
        raise Stop

    monkeypatch.setattr(HelixdPolicy, "run", run)
    with pytest.raises(Stop):
        Simulations(SPEC, seed=0, out_of_time=lambda share: False).run(THREE, predicted)
    assert (loads[0].warmup_s, loads[0].measure_s) == pytest.approx((window_s, window_s))


@pytest.mark.parametrize("looks", [0, 1, 50])
def test_a_simulation_under_way_counts_for_nothing_when_time_is_up(looks: int) -> None:
    left = [looks]

    def out_of_time(share: float) -> bool:
        assert share == pytest.approx((looks - left[0]) / 100)
        left[0] -= 1
        return left[0] < 0

    assert Simulations(SPEC, seed=0, out_of_time=out_of_time).run(THREE, SLOW) is None
    assert left == [-1]


@pytest.mark.parametrize(
    ("share", "after_s", "out"),
    [
        (0.0, 9.9, False),
        (0.0, 10.1, True),
        # A pause right at the start says nothing of the speed.
        (0.01, 0.9, False),
        (0.01, 1.1, True),
        (0.5, 4.9, False),
        (0.5, 5.1, True),
        (1.0, 9.9, False),
        (1.0, 10.1, True),
    ],
)
def test_a_simulation_ends_that_would_not_be_done_in_time(share: float, after_s: float, out: bool) -> None:
    now_s = 3.0
    allowance = Allowance(20.0, lambda: now_s)
    now_s = 10.0
    assert allowance.begin() == 10.0
    now_s += after_s
    assert allowance.out_of_time(share) is out


def uneven() -> ClusterSpec:
    """Several placements are about as good as one another."""
    nodes = (*SPEC.nodes, *(replace(n, id=type(n.id)(f"{n.id}2")) for n in SPEC.nodes))
    ends = ["coordinator", *(n.id for n in nodes)]
    links = [[a, b, 1e8, 0.001] for a in ends for b in ends if a != b]
    listed = [{"id": n.id, "type": "t"} for n in nodes]
    return parse_cluster({**CLUSTER, "nodes": listed, "links": links})


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="/proc tells who the children are")
def test_what_was_predicted_best_is_there_if_simulating_ends_badly() -> None:
    predicted = asyncio.run(solve(Job(uneven(), time_limit_s=10.0, survive=0))).plan

    async def killed() -> Outcome:
        before = children()

        def kill(doing: Doing) -> None:
            if doing.what == "simulating the best plans found":
                for pid in children() - before:
                    os.kill(pid, signal.SIGKILL)

        return await solve(Job(uneven(), time_limit_s=10.0, survive=0, simulate=True), on_progress=kill)

    outcome = asyncio.run(killed())
    assert not outcome.final
    assert predicted is not None
    assert outcome.plan is not None
    assert outcome.plan.placement == predicted.placement


def test_the_planner_s_process_tries_plans_where_it_is_asked_to() -> None:
    said: list[Doing] = []
    asked = Job(uneven(), time_limit_s=10.0, survive=0, simulate=True)
    outcome = asyncio.run(solve(asked, on_progress=said.append))
    assert outcome.final
    assert outcome.plan is not None
    assert outcome.plan.simulated_plans >= 2
    begun = sum(doing.what == "simulating the best plans found" for doing in said)
    # On a machine with much else to do the last one may be begun and not done.
    assert begun - 1 <= outcome.plan.simulated_plans <= begun
    plain = asyncio.run(solve(Job(uneven(), time_limit_s=10.0, survive=0)))
    assert plain.plan is not None
    assert plain.plan.simulated_plans == 0


@pytest.mark.parametrize("room", [0, 30, 200])
def test_where_requests_do_not_fit_the_time_limit_holds(room: int) -> None:
    types = {"t": {**CLUSTER["node_types"]["t"], "kv_capacity_token_layers": [room] * 4}}  # type: ignore[index]
    tight = parse_cluster({**CLUSTER, "node_types": types})
    outcome = asyncio.run(solve(Job(tight, time_limit_s=2.0, survive=0, simulate=True)))
    assert outcome.final
    assert outcome.cut_off is None
