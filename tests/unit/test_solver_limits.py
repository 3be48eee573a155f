"""The planner's process on a cluster of forty: out of time, killed, out of memory. What it had found is the plan."""

import asyncio
import os
import signal
from pathlib import Path

import pytest

from helixd.plan.cluster.spec import ClusterSpec
from helixd.plan.graph.flow import FlowModel
from helixd.plan.plan import Plan
from helixd.solver.job import Doing, Job
from helixd.solver.process import PlannerFailed, solve
from tests.unit.plan_worlds import cluster, node

LAYERS = 80


def forty() -> ClusterSpec:
    """Nodes of four kinds, of which none holds more than a tenth of the model."""
    sizes = (3, 4, 6, 8)
    nodes = [node(f"n{at:02}", [1200.0 * (1 + at % 4) / j for j in range(1, sizes[at % 4] + 1)]) for at in range(40)]
    return cluster(nodes, LAYERS)


def serves(plan: Plan | None) -> bool:
    return plan is not None and FlowModel(forty()).value(plan.placement) > 0


def children() -> set[int]:
    tasks = Path(f"/proc/{os.getpid()}/task")
    return {int(pid) for task in tasks.iterdir() for pid in (task / "children").read_text().split()}


async def test_a_second_is_enough_for_a_plan_of_forty_nodes() -> None:
    outcome = await solve(Job(forty(), time_limit_s=1.0))
    assert outcome.final
    assert outcome.cut_off is None
    assert serves(outcome.plan)
    assert outcome.plan is not None
    assert outcome.plan.upper_bound_tokens_per_s is not None
    assert outcome.plan.max_flow_tokens_per_s <= outcome.plan.upper_bound_tokens_per_s * (1 + 1e-6)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="/proc tells who the children are")
async def test_a_planner_that_is_killed_leaves_what_it_had_found() -> None:
    before, killed = children(), []

    def kill(doing: Doing) -> None:
        if not killed:
            killed.extend(children() - before)
            for pid in killed:
                os.kill(pid, signal.SIGKILL)

    outcome = await solve(Job(forty(), time_limit_s=60.0), on_progress=kill)
    assert len(killed) == 1
    assert not outcome.final
    assert "status -9" in (outcome.cut_off or "")
    assert serves(outcome.plan)


@pytest.mark.parametrize("memory_bytes", [16 << 20, 256 << 20, 1 << 30])
async def test_a_planner_short_of_memory_leaves_what_it_had_found_or_says_so(memory_bytes: int) -> None:
    try:
        outcome = await solve(Job(forty(), time_limit_s=1.0, memory_bytes=memory_bytes))
        plan, why = outcome.plan, outcome.cut_off
    except PlannerFailed as error:
        # Not even the quick rules had room; whoever asked keeps the plan in force.
        plan, why = None, str(error)
    assert serves(plan) or why
    assert why is None or "memory" in why or "status" in why


def test_what_does_not_fit_is_said_in_gib_and_comes_from_the_process() -> None:
    with pytest.raises(Exception, match=r"GiB") as said:
        asyncio.run(solve(Job(cluster([node("a", [10.0])], LAYERS), time_limit_s=1.0)))
    assert "layers" in str(said.value)
