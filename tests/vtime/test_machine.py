"""Hypothesis breaks clusters in virtual time: whatever happens, they come right again."""

from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.budget import LONG, examples
from tests.vtime.machine import ClusterMachine

CI_SEQUENCES = 300
LONG_SEQUENCES = 2000
STEPS = 20


def test_a_cluster_comes_right_again_whatever_happens_to_it() -> None:
    run_state_machine_as_test(
        ClusterMachine,
        settings=settings(
            max_examples=examples(CI_SEQUENCES, LONG_SEQUENCES),
            stateful_step_count=STEPS,
            deadline=None,
            derandomize=not LONG,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
