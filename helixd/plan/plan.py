"""What the planner returns: who holds which layers, how the flow runs, and how good that provably is.

A plan is data. It can be pushed to workers, stored, compared and drawn without the cluster it was made for.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from helixd.errors import HelixError
from helixd.ids import NodeId
from helixd.layers import LayerRange


class Infeasible(HelixError):
    """No placement of all layers exists. The message names the binding constraint in GiB, fit for an operator."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a search is: the best max flow found, what no placement exceeds (tokens/s), and which method found it.

    `elapsed_s` is 0 for a search that was given no clock. `flow` is 0 until something is found.
    """

    elapsed_s: float
    flow: float
    bound: float
    method: str

    @property
    def gap(self) -> float:
        """The share of the bound that is not reached; 0 is proven."""
        return max(0.0, 1 - self.flow / self.bound) if self.bound > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Hop:
    """A possible next hop and its share: the flow planned on the edge, in tokens/s. It is the IWRR weight."""

    node: NodeId
    flow_tokens_per_s: float


@dataclass(frozen=True, slots=True)
class Plan:
    """Placement + flow + schedules.

    `schedule[v]` are the next hops of vertex v that carry flow, heaviest first; v is a node or `COORDINATOR` (the
    source); a hop to `COORDINATOR` is the sink. `placement` has only nodes that hold layers. Throughputs in tokens/s.
    `upper_bound_tokens_per_s` is valid for every placement of this cluster (None: not computed).
    `simulated_plans`: of so many that were simulated it served most (0: the prediction chose).
    `explanations` has one sentence per node that is idle or a bottleneck.
    """

    num_layers: int
    placement: Mapping[NodeId, LayerRange]
    schedule: Mapping[NodeId, tuple[Hop, ...]]
    max_flow_tokens_per_s: float
    upper_bound_tokens_per_s: float | None = None
    predicted_decode_tokens_per_s: float | None = None
    kv_capacity_token_layers: Mapping[NodeId, float] | None = None
    explanations: Mapping[NodeId, str] | None = None
    method: str = ""
    simulated_plans: int = 0
    solve_s: float = 0.0

    def entry_points(self, node: NodeId) -> tuple[int, ...]:
        """Layers at which sequences may enter `node` under this plan, ascending (its start, and mid-range entries)."""
        held = self.placement[node]
        entries = {held.start}
        for src, hops in self.schedule.items():
            if src in self.placement and any(hop.node == node for hop in hops):
                entries.add(self.placement[src].end)
        return tuple(sorted(entry for entry in entries if entry in held))
