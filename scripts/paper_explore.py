"""What the paper did not try, one option at a time; and whether the planner takes the plan that simulates best."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import replace

from paper_inputs import Inputs, Row, our_plan, served, waits

from helixd.plan.cluster.spec import ClusterSpec
from helixd.plan.graph.flow import FlowModel
from helixd.plan.holding import Holding
from helixd.plan.judge import judged
from helixd.plan.plan import Plan
from helixd.plan.planner import plan_cluster
from helixd.plan.search.methods import Candidate, Search
from helixd.plan.undominated import undominated
from helixd.sim.helixd import HelixdPolicy
from helixd.sim.load import Offline, Online
from helixd.sim.stage_node import StepLimits
from helixd.solver.trial import Simulations

_PLAIN = HelixdPolicy()


def _limits(**options: int) -> HelixdPolicy:
    return replace(_PLAIN, limits=replace(StepLimits(), **options))


# Each differs from what the engine and the coordinator do in one thing.
OPTIONS: Mapping[str, HelixdPolicy] = {
    "as it is": _PLAIN,
    "chunks of 32": _limits(chunk_tokens=32),
    "chunks of 64": _limits(chunk_tokens=64),
    "chunks of 256": _limits(chunk_tokens=256),
    "chunks of 512": _limits(chunk_tokens=512),
    "no steps of prefill alone": _limits(prefill_turns=0),
    "two steps of prefill alone": _limits(prefill_turns=2),
    "64 sequences a step": _limits(max_sequences=64),
    "decode waits for prefill on links": replace(_PLAIN, decode_first=False),
    "a message for every token": replace(_PLAIN, frames=False),
    "prefill admitted without bound": replace(_PLAIN, prefill_tokens=None),
    "prefill bounded to 4096 tokens": replace(_PLAIN, prefill_tokens=4096),
    "prefill bounded to 32768 tokens": replace(_PLAIN, prefill_tokens=32768),
    "hops by shares of flow alone": replace(_PLAIN, chooser="flow-alone"),
    "hops by measured queues": replace(_PLAIN, chooser="flow-by-queue"),
    "direct feedback": replace(_PLAIN, feedback=True),
}
_RATES = {"single24-llama70b": 700.0, "distributed24-llama70b": 320.0, "heterogeneous42-llama70b": 2150.0}
_MEASURE_S = 240.0

# Candidates that are simulated: the best predicted, and all that no other beats in flow and stages.
_BEST = 10
_ENOUGH = 0.98


def explore(inputs: Inputs) -> Iterator[Row]:
    """Policy helixd with one thing done otherwise, our plan, 240 s after 120 s: output tokens/s offline, then the
    median waits at the rates of the paper's latency figures.
    """
    for cluster in inputs.clusters:
        spec, plan = inputs.cluster(cluster), our_plan(inputs.cluster(cluster))
        first = 0.0
        for name, policy in OPTIONS.items():
            load = Offline(warmup_s=120.0, measure_s=_MEASURE_S)
            full = policy.run(spec, plan, load, inputs.lengths, seed=inputs.seed)
            arriving = Online(_RATES[cluster], inputs.per_interval, warmup_s=60.0, measure_s=_MEASURE_S)
            light = policy.run(spec, plan, arriving, inputs.lengths, seed=inputs.seed)
            first = first or full.decode_tokens_per_s
            figures = {**served(light), "decode_tokens_per_s": round(full.decode_tokens_per_s, 2)}
            shown = f"{full.decode_tokens_per_s:7.1f} ({full.decode_tokens_per_s / first - 1:+.1%}); {waits(light)}"
            yield Row(cluster, f"{cluster if name == 'as it is' else ' '} {name}", "-", shown, figures=figures)


def choice(inputs: Inputs) -> Iterator[Row]:
    """Whether the plan taken by default simulates within 2 % of the best of those that were met: the ten best
    predicted, and every one that no other beats in flow and stages. Policy helixd, offline, 240 s after 120 s. Where
    the plan survives the loss of any node, it is held against others that do, and the price of that is told; a second
    row then takes the plan that does not care.
    """
    for cluster in inputs.clusters:
        spec = inputs.cluster(cluster)
        ours = _simulated(inputs, spec, our_plan(spec))
        found = _candidates(inputs, spec)
        rates = [_simulated(inputs, spec, judged(Holding(spec), each.placement, method=each.method)) for each in found]
        best = max(rates)
        safe = max((rate for rate, each in zip(rates, found, strict=True) if each.survives), default=0.0)
        survives = FlowModel(spec).survives(our_plan(spec).placement)
        figures = {"decode_tokens_per_s": round(ours, 2), "best": round(best, 2), "best_that_survives": round(safe, 2)}
        if not survives:
            yield _chosen(cluster, "by default", ours, best, f"best of {len(found)}", figures)
            continue
        alike = f"best of those that survive a loss (of all: {best:.1f}, {best / ours - 1:.1%} more)"
        yield _chosen(cluster, "by default", ours, safe, alike, figures)
        trial = Simulations(spec, seed=0, out_of_time=lambda share: False)
        careless = _simulated(inputs, spec, plan_cluster(spec, survive=0, clock=time.monotonic, trial=trial.run))
        figures = {"decode_tokens_per_s": round(careless, 2), "best": round(best, 2)}
        yield _chosen(cluster, "--survive 0", careless, best, f"best of {len(found)}", figures)


def _chosen(cluster: str, what: str, ours: float, best: float, of: str, figures: Mapping[str, object]) -> Row:
    shown = f"{ours:.1f}; {of} is {best:.1f}: {ours / best:.3f} of it"
    return Row(cluster, f"{cluster}, {what}", "-", shown, ours >= _ENOUGH * best, figures)


def _candidates(inputs: Inputs, spec: ClusterSpec) -> list[Candidate]:
    started = time.monotonic()
    search = Search(
        Holding(spec), seed=inputs.seed, effort_s=10.0, out_of_time=lambda: time.monotonic() - started > 10.0,
        widths=(1, 2), frontier=True,
    )  # fmt: skip
    every = search.run()
    every.sort(key=lambda each: -(each.prediction.decode_tokens_per_s if each.prediction else 0.0))
    flows = {point.max_flow_tokens_per_s for point in undominated(every)}
    taken = every[:_BEST]
    return taken + [each for each in every[_BEST:] if each.flow.value in flows]


def _simulated(inputs: Inputs, spec: ClusterSpec, plan: Plan) -> float:
    load = Offline(warmup_s=120.0, measure_s=_MEASURE_S)
    return _PLAIN.run(spec, plan, load, inputs.lengths, seed=inputs.seed).decode_tokens_per_s
