"""A plan by its name on the command line: a file, "auto", or a rule for placing layers."""

import asyncio
import sys
from pathlib import Path

from helixd.commands.cluster_source import with_current
from helixd.commands.failure import CommandFailed
from helixd.commands.progress import Progress
from helixd.exits import Exit
from helixd.plan.baselines import BASELINES, baseline_plan
from helixd.plan.cluster.spec import ClusterSpec
from helixd.plan.holding import Holding
from helixd.plan.judge import judged
from helixd.plan.plan import Infeasible, Plan
from helixd.solver.job import Job
from helixd.solver.process import Outcome, PlannerFailed, solve

AUTO = "auto"
# Most of it is for simulating: a search alone takes a second or two for some dozens of nodes.
DEFAULT_TIME_LIMIT_S = 30.0


def the_plan(name: str, spec: ClusterSpec, *, seed: int = 0) -> Plan:
    """The plan that `name` means. Raises CommandFailed."""
    try:
        if name == AUTO:
            outcome = asyncio.run(_solve(Job(spec, seed=seed, time_limit_s=DEFAULT_TIME_LIMIT_S, simulate=True)))
            assert outcome.plan is not None
            return outcome.plan
        if name in BASELINES and not Path(name).exists():
            return baseline_plan(name, spec, seed=seed)
        held = with_current(spec, Path(name))
        placement = {node.id: node.current_range for node in held.nodes if node.current_range is not None}
        return judged(Holding(spec), placement, method=name)
    except Infeasible as error:
        raise CommandFailed(f"{name}: {error}", Exit.INFEASIBLE) from error
    except PlannerFailed as error:
        raise CommandFailed(f"{name}: {error}", Exit.INTERNAL) from error


async def _solve(job: Job) -> Outcome:
    with Progress(sys.stderr) as progress:
        return await solve(job, on_progress=progress.show)
