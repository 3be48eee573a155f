"""Which of the candidates is taken: by prediction, and by a trial of those that are predicted best."""

from dataclasses import dataclass, field

import pytest

from helixd.ids import NodeId
from helixd.layers import LayerRange
from helixd.plan.choice import choose, choose_by_trial
from helixd.plan.graph.flow import Flow
from helixd.plan.predict import Prediction
from helixd.plan.search.candidates import Candidate


def candidate(
    name: str, predicted: float | None, *, round_s: float = 1.0, depth: float = 2.0, survives: bool = False,
    flow: float = 100.0,
) -> Candidate:  # fmt: skip
    node = NodeId("n")
    prediction = None if predicted is None else Prediction(predicted, 10.0, round_s * 2, round_s)
    found = Flow(flow, {}, {node: flow * depth}, frozenset(), frozenset())
    return Candidate({node: LayerRange(0, 1)}, found, prediction, survives, name)


@dataclass
class Trials:
    """What each candidate serves; None: time is up. Remembers who was run, in order."""

    rates: dict[str, float | None]
    run: list[str] = field(default_factory=list)

    def __call__(self, found: Candidate) -> float | None:
        self.run.append(found.method)
        return self.rates[found.method]


def tried(candidates: list[Candidate], trials: Trials, survive: int | None = None) -> tuple[str, int] | None:
    found = choose_by_trial(candidates, survive, False, trials)
    return None if found is None else (found[0].method, found[1])


def test_what_serves_most_is_taken_not_what_was_predicted_to() -> None:
    found = [candidate("deep", 100, round_s=1.2), candidate("flat", 85), candidate("hopeless", 79)]
    trials = Trials({"deep": 60, "flat": 80})
    assert tried(found, trials) == ("flat", 2)
    assert trials.run == ["deep", "flat"]
    assert tried(found, Trials({"deep": 90, "flat": 80})) == ("deep", 2)


@pytest.mark.parametrize(("rate", "taken"), [(98.1, "quick"), (97.9, "slow")])
def test_nearly_equal_ones_are_told_apart_by_the_lone_request(rate: float, taken: str) -> None:
    found = [candidate("slow", 100, round_s=2.0), candidate("quick", 82, round_s=1.0)]
    assert tried(found, Trials({"slow": 100, "quick": rate})) == (taken, 2)


def test_the_prediction_s_choice_is_tried_first_and_the_rest_as_predicted() -> None:
    found = [
        candidate("c", 81, round_s=3),
        candidate("a", 100, round_s=3),
        candidate("quick", 90),
        candidate("b", 99, round_s=3),
    ]
    trials = Trials({"quick": 50, "a": 60, "b": None, "c": 90})
    assert tried(found, trials) == ("a", 2)
    assert trials.run == ["quick", "a", "b"], "nobody is run after time was up"
    chosen = choose(found, "throughput", None, False)
    assert chosen is not None
    assert chosen.method == "quick"


def test_no_more_than_eight_are_run() -> None:
    found = [candidate(str(n), 100 - n / 10, round_s=1.0 + n) for n in range(12)]
    trials = Trials({str(n): 10.0 + n for n in range(12)})
    assert tried(found, trials) == ("7", 8)


@pytest.mark.parametrize(
    ("found", "rates"),
    [
        ([candidate("only", 100)], {"only": 1.0}),
        ([candidate("far ahead", 100), candidate("behind", 79)], {"far ahead": 1.0, "behind": 9.0}),
        ([candidate("unknown", None), candidate("too", None)], {}),
        ([candidate("one", 100), candidate("two", 99)], {"one": None}),
        ([candidate("one", 100), candidate("two", 99)], {"one": 5.0, "two": None}),
    ],
)
def test_nothing_to_choose_by(found: list[Candidate], rates: dict[str, float | None]) -> None:
    assert tried(found, Trials(rates)) is None


def test_survival_counts_before_any_trial() -> None:
    safe = [candidate("safe", 95, survives=True), candidate("safe too", 92, survives=True)]
    found = [candidate("best", 100), *safe, candidate("dear", 81, survives=True)]
    rates = {"best": 100.0, "safe": 70.0, "safe too": 80.0, "dear": 90.0}
    assert tried(found, Trials(rates)) == ("safe too", 2), "what costs little, unasked"
    assert tried(found, Trials(rates), survive=1) == ("dear", 3), "whatever it costs"
    assert tried(found, Trials(rates), survive=0) == ("best", 4), "not at all"
    assert tried([candidate("a", 100), candidate("b", 99)], Trials({}), survive=1) is None
