"""Plans that were found, simulated for a while to see which one serves most: under full load, as our engine would.

The search knows placements by a prediction; this knows what the prediction leaves out, and takes seconds instead of
milliseconds. Lengths of requests are spread around the workload's means.
"""

from collections.abc import Callable

from helixd.plan.cluster.spec import ClusterSpec
from helixd.plan.plan import Plan
from helixd.sim.helixd import HelixdPolicy
from helixd.sim.load import Lengths, Offline

# Simulated seconds before and while output is counted: as long as a lone request takes, within these.
_SHORTEST_S, _LONGEST_S = 0.1, 120.0


class _TimeIsUp(Exception):
    """Ends a simulation from within."""


class Simulations:
    """What plans of a cluster serve. `out_of_time` is told which share of a simulation is done, from 0 on; where it
    says yes that simulation ends and counts for nothing.
    """

    def __init__(self, spec: ClusterSpec, *, seed: int, out_of_time: Callable[[float], bool]) -> None:
        self._spec = spec
        self._seed = seed
        self._out_of_time = out_of_time
        workload = spec.workload
        self._output_tokens = workload.mean_output_tokens
        self._lengths = Lengths.around(workload.mean_input_tokens, workload.mean_output_tokens, seed=seed)

    def run(self, plan: Plan, round_s: float) -> float | None:
        """Decode tokens/s of a plan in which a lone request's token takes `round_s`; None if time is up."""

        def go_on(share: float) -> None:
            if self._out_of_time(share):
                raise _TimeIsUp

        window_s = min(max(self._output_tokens * round_s, _SHORTEST_S), _LONGEST_S)
        load = Offline(warmup_s=window_s, measure_s=window_s)
        try:
            go_on(0.0)
            found = HelixdPolicy().run(self._spec, plan, load, self._lengths, seed=self._seed, progress=go_on)
        except _TimeIsUp:
            return None
        return found.decode_tokens_per_s
