"""Hypothesis breaks clusters in virtual time: whatever happens, they come right again."""

import hypothesis
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.budget import LONG, examples
from tests.vtime.machine import ClusterMachine

CI_SEQUENCES = 300
LONG_SEQUENCES = 2000
STEPS = 20
# Parts with seeds of their own, so that two processes can share them.
PARTS = 4


@pytest.mark.parametrize("part", range(PARTS))
def test_a_cluster_comes_right_again_whatever_happens_to_it(part: int) -> None:
    machine = type(f"Part{part}", (ClusterMachine,), {})
    run_state_machine_as_test(
        machine if LONG else hypothesis.seed(part)(machine),
        settings=settings(
            max_examples=examples(CI_SEQUENCES, LONG_SEQUENCES) // PARTS,
            stateful_step_count=STEPS,
            deadline=None,
            derandomize=not LONG,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
