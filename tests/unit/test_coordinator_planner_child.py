"""The planner's process: its answer is a plan or a sentence, and nothing that a library prints gets in between."""

import subprocess
import sys
from collections.abc import Callable

import msgspec
import pytest

from helixd.coordinator import planning
from helixd.coordinator.planning import PlannerFailed, run_planner
from helixd.plan.plan import Infeasible, Plan
from helixd.plan.spec import ClusterSpec
from tests.unit.plan_worlds import cluster, equal_nodes

CHILD = [sys.executable, "-m", "helixd.coordinator.planner_child", "5"]


def spec(num_layers: int) -> ClusterSpec:
    return cluster(equal_nodes(3, max_layers=4), num_layers=num_layers)


async def test_a_plan_comes_back_from_the_other_process() -> None:
    plan = await run_planner(spec(8), 5.0)
    assert plan.max_flow_tokens_per_s > 0
    assert {layer for held in plan.placement.values() for layer in held.layers()} == set(range(8))


async def test_what_cannot_be_placed_comes_back_as_the_sentence() -> None:
    with pytest.raises(Infeasible, match="layers"):
        await run_planner(spec(64), 5.0)


def test_the_solver_is_silent_on_both_outputs() -> None:
    ended = subprocess.run(CHILD, input=msgspec.json.encode(spec(8)), capture_output=True, check=True, timeout=60)
    assert msgspec.json.decode(ended.stdout, type=Plan).placement
    assert ended.stderr == b""


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("print('not a plan')", "makes no sense"),
        ("print('{}')", "makes no sense"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "status -11"),
    ],
)
async def test_a_planner_that_fails_is_an_error_of_its_own(
    monkeypatch: pytest.MonkeyPatch, answer: str, said: str
) -> None:
    real = planning.asyncio.create_subprocess_exec

    def instead(program: str, *_: str, **kwargs: object) -> object:
        run: Callable[..., object] = real
        return run(program, "-c", f"import sys; sys.stdin.buffer.read(); {answer}", **kwargs)

    monkeypatch.setattr(planning.asyncio, "create_subprocess_exec", instead)
    with pytest.raises(PlannerFailed, match=said):
        await run_planner(spec(8), 5.0)
