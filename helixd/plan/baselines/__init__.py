"""How others place layers, behind one interface, to compare with. None of them is used to serve.

A baseline sees the same cluster and may use only what its model of the world knows. Its plan is judged like any other:
true max flow, prediction, the nodes' memory and pins.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from helixd.plan.baselines import homogeneous, milp, petals, separate, swarm
from helixd.plan.baselines.layout import Layout
from helixd.plan.cluster.spec import ClusterSpec
from helixd.plan.holding import Holding
from helixd.plan.judge import judged
from helixd.plan.plan import Infeasible, Plan

Place = Callable[[Holding, int, float], Layout]


@dataclass(frozen=True, slots=True)
class Baseline:
    """`about` is a line for tables: whose rule it is, in short. `place(holding, seed, time_limit_s)`."""

    name: str
    about: str
    place: Place


BASELINES: Mapping[str, Baseline] = {
    found.name: found
    for found in (
        Baseline("petals", "each node in turn takes the span that is served worst (Petals)", petals.place),
        Baseline("swarm", "equal stages, strongest nodes to the weakest stage (SWARM)", swarm.place),
        Baseline("separate", "a pipeline of its own for each type of node", separate.place),
        Baseline("homogeneous", "even split, all nodes taken for equal (vLLM)", homogeneous.place),
        Baseline("milp", "the paper's program, as published, on HiGHS (Helix)", milp.place),
    )
}


def baseline_plan(
    name: str,
    spec: ClusterSpec,
    *,
    seed: int = 0,
    time_limit_s: float = 10.0,
    clock: Callable[[], float] | None = None,
) -> Plan:
    """The plan of baseline `name`. Raises KeyError for an unknown name, Infeasible where its rule finds none."""
    started = clock() if clock else 0.0
    holding = Holding(spec)
    layout = BASELINES[name].place(holding, seed, time_limit_s)
    # The links that the rule's pipelines do not use are not there for it, whatever the max flow could make of them.
    own = holding if layout.links is None else Holding(replace(spec, links=layout.links))
    plan = judged(own, layout.placement, method=name)
    return replace(plan, solve_s=clock() - started if clock else 0.0)


__all__ = ["BASELINES", "Baseline", "Infeasible", "baseline_plan"]
