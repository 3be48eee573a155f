"""scripts/rehearse.py on a small cluster: real daemons, and the simulator's figures for the same plan beside theirs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.functional.test_emulation import cluster_file

SCRIPT = Path(__file__).parents[2] / "scripts" / "rehearse.py"
REPEATABLE = ("--time-scale", "3", "--warm-up", "0.5", "--window", "1.5", "--in-flight", "6")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """A cluster file, and lengths so short that requests end inside the window."""
    home = tmp_path_factory.mktemp("rehearse")
    lengths = home / "lengths.csv"
    lengths.write_text("input_tokens,output_tokens\n20,6\n12,9\n")
    return str(cluster_file(home / "cluster.json")), "--trace", str(lengths)


def rehearse(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=120, check=False
    )


def test_it_prints_what_was_seen_beside_what_is_simulated(inputs: tuple[str, ...]) -> None:
    # What is tested is the script, not this machine: it may be as busy as it likes.
    done = rehearse(*inputs, *REPEATABLE, "--busy-limit", "2", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["errors"] == []
    assert (found["time_scale"], found["window_s"], found["in_flight"]) == (3.0, 1.5, 6)
    assert set(found["placement"]) <= {"fast", "slow1", "slow2"}
    for side in ("rehearsed", "simulated"):
        assert found[side]["finished"] > 0
        assert found[side]["total_tokens_per_s"] > found[side]["decode_tokens_per_s"] > 0
        assert 0 < found[side]["ttft_s"]["p50"] <= found[side]["ttft_s"]["p95"]
    assert found["ratio"] == pytest.approx(
        found["rehearsed"]["decode_tokens_per_s"] / found["simulated"]["decode_tokens_per_s"]
    )
    # Load on this machine slows a rehearsal; nothing may make it much faster than the file says.
    assert found["ratio"] < 1.25
    assert found["rehearsed"]["tpot_s"]["p50"] > 0.8 * found["simulated"]["tpot_s"]["p50"]


def test_a_run_on_a_busy_machine_is_repeated_slower_and_does_not_count(inputs: tuple[str, ...]) -> None:
    done = rehearse(*inputs, *REPEATABLE, "--busy-limit", "-1", "--max-scale", "3")
    assert done.returncode == 1
    assert "too much to count" in done.stderr
    assert "--max-scale 3" in done.stderr
    assert "rehearsed" not in done.stdout
