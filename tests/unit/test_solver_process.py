"""The planner's process: one job goes in, plans come out, and nothing that a library prints gets in between."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from helixd.layers import LayerRange
from helixd.plan.cluster.spec import ClusterSpec
from helixd.plan.holding import Holding
from helixd.plan.judge import current_plan
from helixd.plan.plan import Infeasible
from helixd.solver import process
from helixd.solver.job import AnyAnswer, Doing, Failed, Found, Job
from helixd.solver.process import COMMAND, PlannerFailed, solve
from tests.unit.plan_worlds import cluster, equal_nodes, node

ROOT = Path(__file__).parents[2]


def spec(num_layers: int = 8) -> ClusterSpec:
    return cluster(equal_nodes(3, max_layers=4), num_layers=num_layers)


def job(num_layers: int = 8, **asked: object) -> Job:
    return msgspec.structs.replace(Job(spec(num_layers), time_limit_s=2.0), **asked)


def held_already() -> ClusterSpec:
    plain = spec()
    held = {"n0": LayerRange(0, 4), "n1": LayerRange(4, 8)}
    return replace(plain, nodes=tuple(replace(n, current_range=held.get(n.id)) for n in plain.nodes))


@pytest.fixture(autouse=True)
def _cores_stay_away(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where cores are written at all, that of a process that is made to crash goes where it was started."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)


def pretend(monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """A process of our own in the planner's place: it reads its job, then does `body`, with the answer `FOUND`."""
    plan = current_plan(Holding(held_already()))
    assert plan is not None
    found = msgspec.json.encode(Found(plan, final=False)) + b"\n"
    script = f"import os, signal, sys, time\nsys.stdin.buffer.read()\nFOUND = {found!r}\n{body}"
    monkeypatch.setattr(process, "COMMAND", (sys.executable, "-c", script))


SEND = "os.write(1, FOUND)\n"


async def test_a_plan_comes_back_from_the_other_process_with_what_else_was_asked_for() -> None:
    told: list[Doing] = []
    asked = job(survive=1, price=True, baselines=("swarm", "separate"), frontier=True)
    asked = msgspec.structs.replace(asked, spec=cluster(equal_nodes(4, max_layers=4), 8))
    outcome = await solve(asked, on_progress=told.append)
    assert outcome.final
    assert outcome.cut_off is None
    assert outcome.plan is not None
    assert {layer for held in outcome.plan.placement.values() for layer in held.layers()} == set(range(8))
    assert outcome.unconstrained is not None
    assert outcome.unconstrained.max_flow_tokens_per_s >= outcome.plan.max_flow_tokens_per_s - 1e-6
    assert [found.name for found in outcome.compared] == ["swarm", "separate"]
    assert outcome.depths
    assert {"plan", "swarm", "flow against depth"} <= {doing.what for doing in told}


async def test_a_baseline_without_a_plan_says_why() -> None:
    # Three nodes of four layers hold twelve in an even split; no type of node holds them by itself.
    other = node("other", [100.0] * 4)
    other = replace(other, profile=replace(other.profile, type="other"))
    unequal = cluster([*equal_nodes(2, max_layers=4), other], num_layers=12)
    outcome = await solve(Job(unequal, time_limit_s=2.0, baselines=("homogeneous", "separate")))
    homogeneous, separate = outcome.compared
    assert homogeneous.plan is not None
    assert separate.plan is None
    assert "no type of node holds the model by itself" in separate.reason
    assert "takes other " in separate.reason


async def test_what_cannot_be_placed_comes_back_as_the_sentence() -> None:
    with pytest.raises(Infeasible, match="layers"):
        await solve(job(64))


def test_the_solver_is_silent_on_both_outputs() -> None:
    ended = subprocess.run(COMMAND, input=msgspec.json.encode(job()), capture_output=True, check=True, timeout=60)
    answers = [msgspec.json.decode(line, type=AnyAnswer) for line in ended.stdout.splitlines()]
    assert isinstance(answers[-1], Found)
    assert answers[-1].final
    assert ended.stderr == b""


def test_there_is_something_to_fall_back_to_before_the_search() -> None:
    asked = Job(held_already())
    ended = subprocess.run(COMMAND, input=msgspec.json.encode(asked), capture_output=True, check=True, timeout=60)
    first = msgspec.json.decode(ended.stdout.splitlines()[0], type=AnyAnswer)
    assert isinstance(first, Found)
    assert not first.final
    now = current_plan(Holding(held_already()))
    assert now is not None
    assert first.plan.max_flow_tokens_per_s >= now.max_flow_tokens_per_s > 0


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("print('not a plan')", "makes no sense"),
        ("print('{}')", "makes no sense"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "status -11"),
        ("pass", "without a plan"),
        ("time.sleep(60)", "not done within"),
    ],
)
def test_a_planner_that_fails_is_an_error_of_its_own(monkeypatch: pytest.MonkeyPatch, body: str, said: str) -> None:
    pretend(monkeypatch, body)
    monkeypatch.setattr(process, "GRACE_S", 0.2)
    with pytest.raises(PlannerFailed, match=said):
        asyncio.run(solve(job(time_limit_s=0.5)))


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "status -9"),
        ("time.sleep(60)", "not done within"),
        ('os.write(1, b\'{"type": "Failed", "reason": "too much memory"}\\n\')', "too much memory"),
        ("pass", "middle of its search"),
    ],
)
def test_what_was_found_before_a_failure_is_kept(monkeypatch: pytest.MonkeyPatch, body: str, said: str) -> None:
    pretend(monkeypatch, SEND + body)
    monkeypatch.setattr(process, "GRACE_S", 0.2)
    outcome = asyncio.run(solve(job(time_limit_s=0.5)))
    assert outcome.plan is not None
    assert not outcome.final
    assert outcome.cut_off is not None
    assert said in outcome.cut_off


def test_the_memory_limit_holds() -> None:
    script = (
        "import sys\nfrom helixd.solver import child\n"
        "child.plan_cluster = lambda *a, **k: bytearray(8 << 30)\nsys.exit(child.main())"
    )
    asked = msgspec.json.encode(job(memory_bytes=1 << 30))
    ended = subprocess.run([sys.executable, "-c", script], input=asked, capture_output=True, check=True, timeout=60)
    last = msgspec.json.decode(ended.stdout.splitlines()[-1], type=AnyAnswer)
    assert isinstance(last, Failed)
    assert "1.0 GiB of memory" in last.reason


def test_cancelling_kills_the_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pidfile = tmp_path / "pid"
    pretend(monkeypatch, f"open({str(pidfile)!r}, 'w').write(str(os.getpid())); time.sleep(60)")

    async def cancelled() -> None:
        running = asyncio.create_task(solve(job()))
        while not (pidfile.exists() and pidfile.read_text()):
            await asyncio.sleep(0.01)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running

    asyncio.run(cancelled())
    with pytest.raises(ProcessLookupError):
        os.kill(int(pidfile.read_text()), 0)


def ignores(pid: int, number: int) -> bool:
    text = Path(f"/proc/{pid}/status").read_text()
    (mask,) = (line.split()[1] for line in text.splitlines() if line.startswith("SigIgn"))
    return bool(int(mask, 16) >> (number - 1) & 1)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="/proc tells which signals a process ignores")
def test_ctrl_c_is_the_parents_to_act_on() -> None:
    child = subprocess.Popen(COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with child:
        assert child.stdin is not None
        child.stdin.write(msgspec.json.encode(job())[:1])
        child.stdin.flush()
        # It has not read all of its job yet: wait until it has set itself up.
        while not ignores(child.pid, signal.SIGINT):
            time.sleep(0.02)
        child.send_signal(signal.SIGINT)
        child.stdin.write(msgspec.json.encode(job())[1:])
        out, err = child.communicate(timeout=60)
    assert child.returncode == 0
    assert out
    assert err == b""


async def test_a_process_that_cannot_be_started_is_the_same_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its program may have been replaced by an upgrade; whoever serves goes on with the plan there is."""
    monkeypatch.setattr(process, "COMMAND", ("/nowhere/python",))
    with pytest.raises(PlannerFailed, match="cannot be started"):
        await solve(job())


@pytest.mark.parametrize("time_limit_s", [1e10, 1e22])
async def test_a_time_limit_beyond_what_an_alarm_can_be_set_to_is_no_limit(time_limit_s: float) -> None:
    alone = cluster(equal_nodes(1, max_layers=8), 8)
    async with asyncio.timeout(60):
        outcome = await solve(Job(alone, time_limit_s=time_limit_s))
    assert outcome.final
    assert outcome.cut_off is None
