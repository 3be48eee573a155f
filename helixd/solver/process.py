"""Run the planner's process and gather its answers. It may crash, hang or run out of memory: that is one error here.

What it had found by then is kept: an incumbent is better than no plan. Cancelling the call kills the process.
"""

import asyncio
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import msgspec

from helixd.errors import HelixError
from helixd.plan.plan import Infeasible, Plan
from helixd.plan.undominated import FrontierPoint
from helixd.solver.job import (
    AnyAnswer,
    Compared,
    Depths,
    Doing,
    Failed,
    Found,
    InForce,
    Job,
    Moving,
    Refused,
    Unconstrained,
)

GRACE_S = 20.0
MAX_LINE_BYTES = 64 << 20
COMMAND = (sys.executable, "-m", "helixd.solver.child")

_decoder = msgspec.json.Decoder(AnyAnswer)


class PlannerFailed(HelixError):
    """The planner's process gave no plan (crash, time, memory, nonsense); whatever plan there was stays."""


@dataclass(slots=True)
class Outcome:
    """What came of a job. `cut_off`: why the search ended before it was done; `plan` is then the best known."""

    plan: Plan | None = None
    final: bool = False
    in_force: Plan | None = None
    moving: Moving | None = None
    unconstrained: Plan | None = None
    compared: list[Compared] = field(default_factory=list)
    depths: tuple[FrontierPoint, ...] = ()
    depths_known: bool = False
    cut_off: str | None = None

    def complete(self, job: Job) -> bool:
        """Whether everything that was asked for is there."""
        return (
            self.final
            and (self.unconstrained is not None or not job.price)
            and len(self.compared) == len(job.baselines)
            and (self.depths_known or not job.frontier)
        )


async def solve(job: Job, *, on_progress: Callable[[Doing], None] | None = None) -> Outcome:
    """Do a job in a child process. The outcome has a plan, at least one from before the search.

    Raises Infeasible if no placement serves the model, PlannerFailed if the process did not start or gave no plan.
    """
    outcome = Outcome()
    limit_s = job.longest_s + GRACE_S
    try:
        child = await asyncio.create_subprocess_exec(
            *COMMAND, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=MAX_LINE_BYTES,
            env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )  # fmt: skip
    except OSError as error:
        raise PlannerFailed(f"the planner's process cannot be started: {error}") from error
    try:
        async with asyncio.timeout(limit_s):
            await _converse(child, job, outcome, on_progress)
            # What is left to do when everything is there is none of anybody's business.
            status = 0 if outcome.complete(job) else await child.wait()
        if status != 0 and outcome.cut_off is None:
            outcome.cut_off = f"the planner's process ended with status {status}"
    except TimeoutError:
        if not outcome.complete(job):
            outcome.cut_off = f"the planner's process was not done within {limit_s:g} s"
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
    if outcome.plan is None:
        raise PlannerFailed(outcome.cut_off or "the planner's process ended without a plan")
    if not outcome.final and outcome.cut_off is None:
        outcome.cut_off = "the planner's process ended in the middle of its search"
    return outcome


async def _converse(
    child: asyncio.subprocess.Process, job: Job, outcome: Outcome, on_progress: Callable[[Doing], None] | None
) -> None:
    assert child.stdin is not None
    assert child.stdout is not None
    # A process that dies at once does not read; its status says so.
    with suppress(BrokenPipeError, ConnectionResetError):
        child.stdin.write(msgspec.json.encode(job))
        await child.stdin.drain()
        child.stdin.close()
    while not outcome.complete(job):
        try:
            line = await child.stdout.readline()
            if not line:
                return
            answer = _decoder.decode(line)
        except (msgspec.DecodeError, ValueError) as error:
            outcome.cut_off = f"the planner's answer makes no sense: {error}"
            return
        match answer:
            case Doing():
                if on_progress is not None:
                    on_progress(answer)
            case Found(plan, final):
                outcome.plan, outcome.final = plan, final
            case InForce(plan):
                outcome.in_force = plan
            case Moving():
                outcome.moving = answer
            case Unconstrained(plan):
                outcome.unconstrained = plan
            case Compared():
                outcome.compared.append(answer)
            case Depths(points):
                outcome.depths, outcome.depths_known = points, True
            case Refused(reason):
                if not outcome.final:
                    raise Infeasible(reason)
                outcome.cut_off = reason
            case Failed(reason):
                outcome.cut_off = reason
