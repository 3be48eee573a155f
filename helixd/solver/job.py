"""What goes in and out of the planner's process: one job as JSON on stdin, answers as JSON lines on stdout.

Every answer stands for itself, so that whoever reads has the best plan so far when the process ends before its time.
"""

import msgspec

from helixd.ids import NodeId
from helixd.layers import LayerRange
from helixd.plan.cluster.spec import ClusterSpec
from helixd.plan.plan import Plan
from helixd.plan.replan import Option
from helixd.plan.undominated import FrontierPoint

DEFAULT_MEMORY_BYTES = 4 << 30
# The process ends by itself so long after its time, if nobody kills it.
OVERTIME_S = 30.0


class Reload(msgspec.Struct, frozen=True):
    """How fast nodes load weights, and for how long a plan is expected to stay (see `helixd.plan.replan.replan`)."""

    load_bytes_per_s: float
    horizon_s: float


class Job(msgspec.Struct, frozen=True):
    """A cluster to plan, within `time_limit_s` for each plan asked for, and `memory_bytes` of address space.

    `objective`, `seed`, `survive`: see `helixd.plan.planner.plan_cluster`. `price`: also the plan without `survive`.
    `baselines`: names of `helixd.plan.baselines`. `frontier`: also flow against depth. `simulate`: take, of the plans
    predicted best, the one that simulates best, in what the search leaves of its time (not where `reload` counts).
    `in_force`: a placement to be judged as well, on the cluster as it is now. `reload`: what loading costs, for the
    plan to move only what is worth moving from what nodes hold; None to plan as if nothing were held. `nice`: how far
    the process stands back behind others.
    """

    spec: ClusterSpec
    time_limit_s: float = 10.0
    objective: str = "throughput"
    seed: int = 0
    survive: int | None = None
    price: bool = False
    baselines: tuple[str, ...] = ()
    frontier: bool = False
    simulate: bool = False
    in_force: dict[NodeId, LayerRange] | None = None
    reload: Reload | None = None
    nice: int = 0
    memory_bytes: int | None = DEFAULT_MEMORY_BYTES

    @property
    def longest_s(self) -> float:
        """Seconds after which everything asked for is there, if the planner keeps its time."""
        return self.time_limit_s * (1 + self.price + self.frontier + len(self.baselines))


class Answer(msgspec.Struct, frozen=True, tag=True):
    """A line of the planner's process."""


class Doing(Answer, frozen=True, tag=True):
    """What is searched for now, the best flow and the bound so far (0 and infinity are None: nothing yet)."""

    what: str
    elapsed_s: float
    flow_tokens_per_s: float | None = None
    bound_tokens_per_s: float | None = None
    method: str = ""


class Found(Answer, frozen=True, tag=True):
    """A plan. Not `final`: something to fall back to, from before the search."""

    plan: Plan
    final: bool


class InForce(Answer, frozen=True, tag=True):
    """What the placement in force is worth now; None if no pipeline is left of it."""

    plan: Plan | None


class Unconstrained(Answer, frozen=True, tag=True):
    """The plan that `survive` was the price of."""

    plan: Plan


class Compared(Answer, frozen=True, tag=True):
    """A baseline's plan, or the sentence why it has none."""

    name: str
    plan: Plan | None
    reason: str = ""


class Depths(Answer, frozen=True, tag=True):
    """Flow against depth."""

    points: tuple[FrontierPoint, ...]


class Moving(Answer, frozen=True, tag=True):
    """The other ways there were to go on from what nodes hold, each moving more and serving more than the one before.

    `load_s`: seconds until the plan found serves in full.
    """

    load_s: float
    options: tuple[Option, ...]


class Refused(Answer, frozen=True, tag=True):
    """No placement serves the model; `reason` is the planner's sentence."""

    reason: str


class Failed(Answer, frozen=True, tag=True):
    """The search ended in an error of its own; what was found before holds."""

    reason: str


AnyAnswer = Doing | InForce | Found | Moving | Unconstrained | Compared | Depths | Refused | Failed
