"""The planner's own process: a Job on stdin, answers as JSON lines on stdout. `python -m helixd.solver.child`.

Bounded in memory and time by the system itself, so that a search gone wrong ends without harm. Its answers are the
only thing on its stdout, whatever the solver's library has to say. Ctrl-C is its parent's to act on.
"""

import math
import os
import resource
import signal
import sys
import time
from typing import BinaryIO

import msgspec

from helixd.plan.baselines import baseline_plan
from helixd.plan.holding import Holding
from helixd.plan.judge import current_plan, in_force
from helixd.plan.plan import Infeasible, Plan, Progress
from helixd.plan.planner import Trial, plan_cluster
from helixd.plan.predict import Prediction
from helixd.plan.replan import replan
from helixd.plan.undominated import frontier
from helixd.solver.job import (
    OVERTIME_S,
    Answer,
    Compared,
    Depths,
    Doing,
    Failed,
    Found,
    InForce,
    Job,
    Moving,
    Refused,
    Reload,
    Unconstrained,
)
from helixd.solver.trial import Allowance, Simulations, TimeIsUp

# Rules that take less than a second, in clusters of up to so many nodes: what they place is there if the search dies.
_AT_ONCE = {"swarm": 400, "petals": 100}
_PROGRESS_S = 0.1
_LONGEST_ALARM_S = 2**31 - 1


def main() -> int:
    """Answer one job."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    out = _own_stdout()
    job = msgspec.json.decode(sys.stdin.buffer.read(), type=Job)
    os.nice(job.nice)
    _limit(job)
    worker = _Worker(job, out)
    try:
        worker.run()
    except Infeasible as error:
        worker.say(Refused(str(error)))
    except MemoryError:
        worker.say(Failed(f"the planner needs more than its {(job.memory_bytes or 0) / 2**30:.1f} GiB of memory"))
    except BrokenPipeError:
        return 1
    return 0


class _Worker:
    def __init__(self, job: Job, out: BinaryIO) -> None:
        self._job = job
        self._out = out
        self._started = time.monotonic()
        self._said_s = -math.inf

    def say(self, answer: Answer) -> None:
        self._out.write(msgspec.json.encode(answer) + b"\n")
        self._out.flush()

    def run(self) -> None:
        """Everything that was asked for, the plan first. Raises Infeasible if there is no plan."""
        job = self._job
        if job.in_force is not None:
            self.say(InForce(in_force(Holding(job.spec), job.in_force)))
        if (plan := self._at_once()) is not None:
            self.say(Found(plan, final=False))
        holds = any(node.current_range is not None for node in job.spec.nodes)
        if job.reload is not None and holds and job.objective != "latency":
            self._replan(job.reload)
        else:
            self.say(Found(self._search("plan", job.survive, simulate=job.simulate), final=True))
        if job.price:
            self.say(Unconstrained(self._search("plan without survival", 0)))
        for name in job.baselines:
            self.say(Doing(name, self._elapsed_s()))
            self.say(self._compare(name))
        if job.frontier:
            self.say(Doing("flow against depth", self._elapsed_s()))
            points = frontier(job.spec, seed=job.seed, time_limit_s=job.time_limit_s, clock=time.monotonic)
            self.say(Depths(points))

    def _replan(self, reload: Reload) -> None:
        job = self._job
        self.say(Doing("plan from what nodes hold", self._elapsed_s()))
        found = replan(
            job.spec, load_bytes_per_s=reload.load_bytes_per_s, horizon_s=reload.horizon_s, objective=job.objective,
            survive=job.survive, seed=job.seed, time_limit_s=job.time_limit_s, clock=time.monotonic,
        )  # fmt: skip
        self.say(Moving(found.load_s, found.options))
        self.say(Found(found.plan, final=True))

    def _search(self, what: str, survive: int | None, *, simulate: bool = False) -> Plan:
        def report(progress: Progress) -> None:
            if progress.elapsed_s - self._said_s >= _PROGRESS_S or not math.isfinite(self._said_s):
                self._said_s = progress.elapsed_s
                bound = progress.bound if math.isfinite(progress.bound) else None
                self.say(Doing(what, self._elapsed_s(), progress.flow or None, bound, progress.method))

        self._said_s = -math.inf
        job = self._job
        return plan_cluster(
            job.spec, seed=job.seed, time_limit_s=job.time_limit_s, objective=job.objective, survive=survive,
            clock=time.monotonic, on_progress=report, trial=self._trial() if simulate else None,
        )  # fmt: skip

    def _trial(self) -> Trial:
        """Simulates plans in what the search has left of its time."""
        allowance = Allowance(time.monotonic() + self._job.time_limit_s, time.monotonic)
        first = True

        def trial(plan: Plan, predicted: Prediction) -> float | None:
            nonlocal first
            if first:
                # What the prediction chose.
                self.say(Found(plan, final=False))
            first = False
            left_s = allowance.begin()
            self.say(Doing("simulating the best plans found", self._elapsed_s()))
            # Simulated time may stand still where requests do not fit, and then nobody is asked whether time is up.
            signal.signal(signal.SIGVTALRM, stop)
            signal.setitimer(signal.ITIMER_VIRTUAL, max(0.1, left_s))
            try:
                return simulations.run(plan, predicted)
            finally:
                signal.setitimer(signal.ITIMER_VIRTUAL, 0.0)

        def stop(*_: object) -> None:
            raise TimeIsUp

        simulations = Simulations(self._job.spec, seed=self._job.seed, out_of_time=allowance.out_of_time)
        return trial

    def _at_once(self) -> Plan | None:
        """The best of what nodes hold now and of what quick rules place; None where none of them serves."""
        plans = [current_plan(Holding(self._job.spec))]
        for name, most in _AT_ONCE.items():
            if len(self._job.spec.nodes) > most:
                continue
            try:
                plan = baseline_plan(name, self._job.spec, seed=self._job.seed)
            except Infeasible:
                continue
            plans.append(plan if not _breaks_pins(plan, self._job) else None)
        if self._job.survive:
            return None
        return max((p for p in plans if p is not None), key=lambda p: p.max_flow_tokens_per_s, default=None)

    def _compare(self, name: str) -> Compared:
        job = self._job
        try:
            plan = baseline_plan(
                name, job.spec, seed=job.seed, time_limit_s=job.time_limit_s, clock=time.monotonic
            )  # fmt: skip
        except Infeasible as error:
            return Compared(name, None, str(error))
        return Compared(name, plan)

    def _elapsed_s(self) -> float:
        return time.monotonic() - self._started


def _breaks_pins(plan: Plan, job: Job) -> bool:
    holding = Holding(job.spec)
    return any(holding.must_hold(node.id) and node.id not in plan.placement for node in job.spec.nodes)


def _limit(job: Job) -> None:
    """Bound this process's address space and its life, where the system can."""
    signal.alarm(min(math.ceil(job.longest_s + OVERTIME_S), _LONGEST_ALARM_S))
    if job.memory_bytes is not None:
        _, most = resource.getrlimit(resource.RLIMIT_AS)
        limit = job.memory_bytes if most == resource.RLIM_INFINITY else min(job.memory_bytes, most)
        try:
            resource.setrlimit(resource.RLIMIT_AS, (limit, most))
        except (ValueError, OSError):
            # A system without this limit (macOS refuses it): time still bounds the search.
            return


def _own_stdout() -> BinaryIO:
    """The process's stdout as a file of our own. Descriptor 1 leads nowhere from now on: HiGHS prints its licence
    there even when it is told to be silent.
    """
    answer = os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
    return answer


if __name__ == "__main__":
    sys.exit(main())
