"""Which of the placements that a search found is taken.

By prediction alone, which takes no time and is off by a tenth; or by a trial, where somebody can run a plan for a while
(the planner cannot), of those that the prediction does not rule out.
"""

from collections.abc import Callable, Sequence

from helixd.plan.predict import stages
from helixd.plan.search.candidates import Candidate

# Of two plans this close the one with the faster token for a lone request is taken: fewer stages, nearer ones. A
# prediction is off by some 12 % from what is simulated, and deep plans are the ones that fall short of theirs.
_SAME = 0.13
# A trial is off by less. Those that are predicted to fall so far behind are not tried, nor are more than so many.
_SAME_TRIED = 0.02
_HOPELESS = 0.2
_MOST_TRIED = 8
# What is given up, unasked, for keeping a pipeline when any one node is lost: a share of the best predicted throughput;
# in a small cluster, where the loss of a node is the end of service, a larger share of throughput or of flow.
_SURVIVAL_PRICE, _SURVIVAL_PRICE_SMALL = 0.1, 0.35

Try = Callable[[Candidate], float | None]
"""Decode tokens/s that a candidate serves when it is run; None: there is no time for it."""


def choose(candidates: list[Candidate], objective: str, survive: int | None, small: bool) -> Candidate | None:
    """The best candidate; among nearly equal ones that with the fastest round, then fewer stages, then the earlier."""
    if survive:
        candidates = [found for found in candidates if found.survives]
        if not candidates:
            return None
    if objective == "max-flow":
        top = max(found.flow.value for found in candidates)
        return min((f for f in candidates if f.flow.value >= top * (1 - 1e-9)), key=lambda f: stages(f.flow))
    if objective == "latency":
        top = max(found.flow.value for found in candidates)
        return min((f for f in candidates if f.flow.value >= top / 2), key=_round_s)
    return _fastest(_eligible(candidates, survive, small), _worth, _SAME)


def choose_by_trial(
    candidates: list[Candidate], survive: int | None, small: bool, run: Try
) -> tuple[Candidate, int] | None:
    """The candidate that serves most of so many that were run; among nearly equal ones as `choose` does.

    None where nothing is left to choose by: one candidate only, no predictions, or no time for two trials.
    """
    if survive:
        candidates = [found for found in candidates if found.survives]
    if not candidates or any(found.prediction is None for found in candidates):
        return None
    eligible = _eligible(candidates, survive, small)
    first = _fastest(eligible, _worth, _SAME)
    top = max(map(_worth, eligible))
    others = sorted((f for f in eligible if f is not first and _worth(f) >= top * (1 - _HOPELESS)), key=_worth)
    if not others:
        return None
    tried: list[tuple[Candidate, float]] = []
    for found in [first, *reversed(others)][:_MOST_TRIED]:
        rate = run(found)
        if rate is None:
            break
        tried.append((found, rate))
    if len(tried) < 2:
        return None
    rates = {id(found): rate for found, rate in tried}
    return _fastest([found for found, _ in tried], lambda found: rates[id(found)], _SAME_TRIED), len(tried)


def _eligible(candidates: list[Candidate], survive: int | None, small: bool) -> list[Candidate]:
    """Where nothing is said of survival: those that survive the loss of any node and cost little. If there are none, or
    something is said: all.
    """
    if survive is not None:
        return candidates
    top = max(map(_worth, candidates))
    return [f for f in candidates if f.survives and _affordable(f, candidates, top, small)] or candidates


def _affordable(safe: Candidate, candidates: list[Candidate], top: float, small: bool) -> bool:
    if not small:
        return _worth(safe) >= top * (1 - _SURVIVAL_PRICE)
    most = max(found.flow.value for found in candidates)
    left = 1 - _SURVIVAL_PRICE_SMALL
    return _worth(safe) >= top * left or safe.flow.value >= most * left


def _fastest(candidates: Sequence[Candidate], worth: Callable[[Candidate], float], same: float) -> Candidate:
    top = max(map(worth, candidates))
    near = [found for found in candidates if worth(found) >= top * (1 - same)]
    return min(near, key=lambda found: (round(_round_s(found), 6), round(stages(found.flow), 6), -worth(found)))


def _worth(found: Candidate) -> float:
    """Predicted decode tokens/s; where layer times are unknown, flow at a small price per stage."""
    if found.prediction is not None:
        return found.prediction.decode_tokens_per_s
    return found.flow.value * float(0.97 ** stages(found.flow))


def _round_s(found: Candidate) -> float:
    return found.prediction.unloaded_round_s if found.prediction is not None else stages(found.flow)
