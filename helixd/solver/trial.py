"""Plans that were found, simulated for a while to see which one serves most: under full load, as our engine would.

The search knows placements by a prediction; this knows what the prediction leaves out, and takes seconds instead of
milliseconds. Lengths of requests are spread around the workload's means.
"""

from collections.abc import Callable

from helixd.plan.cluster.spec import ClusterSpec
from helixd.plan.plan import Plan
from helixd.plan.predict import Prediction
from helixd.sim.helixd import HelixdPolicy
from helixd.sim.load import Lengths, Offline
from helixd.sim.script import SimulationStopped

# Output is counted for as long as so many requests take under full load, one after another, and for as long before: a
# cluster that fills computes prompts above all. Large clusters are expensive to simulate and get less, but no less than
# a lone request takes: so many output tokens are simulated in all, by prediction.
_REQUESTS = 3.0
_ENOUGH_TOKENS = 200_000
_FEWEST = 2.0
# The first steps say little of how fast a simulation is, and one pause of a busy machine is longer than they are.
_BELIEVED = 0.1


class TimeIsUp(Exception):
    """Ends a simulation from within; whoever raises it there ends it too."""


class Allowance:
    """Time for simulations, until `ends_s` of `clock`, one after another."""

    def __init__(self, ends_s: float, clock: Callable[[], float]) -> None:
        self._ends_s = ends_s
        self._clock = clock
        self._began_s = clock()

    def begin(self) -> float:
        """One begins. How many seconds it may take."""
        self._began_s = self._clock()
        return self._ends_s - self._began_s

    def out_of_time(self, share: float) -> bool:
        """Whether the one under way, of which `share` is done, will not be done in time at the speed so far."""
        spent_s = self._clock() - self._began_s
        left_s = self._ends_s - self._began_s
        return spent_s > left_s * (max(share, _BELIEVED) if share else 1.0)


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

    def run(self, plan: Plan, predicted: Prediction) -> float | None:
        """Decode tokens/s of a plan; None if time is up, or if the cluster has no room for two requests at once."""

        def go_on(share: float) -> None:
            if self._out_of_time(share):
                raise TimeIsUp

        if predicted.in_flight < _FEWEST:
            return None
        window_s = self._window_s(predicted)
        load = Offline(warmup_s=window_s, measure_s=window_s)
        try:
            go_on(0.0)
            found = HelixdPolicy().run(self._spec, plan, load, self._lengths, seed=self._seed, progress=go_on)
        except (TimeIsUp, SimulationStopped):
            return None
        return found.decode_tokens_per_s

    def _window_s(self, predicted: Prediction) -> float:
        wanted_s = _REQUESTS * self._output_tokens * predicted.round_s
        affordable_s = _ENOUGH_TOKENS / 2 / max(1.0, predicted.decode_tokens_per_s)
        return max(min(wanted_s, affordable_s), self._output_tokens * predicted.unloaded_round_s)
