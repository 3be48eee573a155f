"""Coverage-guided fuzzing of what strangers' bytes reach first: 30 s, five minutes with `--long`."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.budget import examples
from tests.fuzz.target import seeds

ROOT = Path(__file__).parents[2]
RSS_LIMIT_MIB = 512
"""Python and the fuzzer's own tables take about 100 MiB; a decoder that multiplies what it is sent takes the rest."""

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.skipif(
        importlib.util.find_spec("atheris") is None,
        reason="atheris is not installed (it has wheels for Linux on x86-64 only): pip install -e '.[fuzz]'",
    ),
]


def test_only_the_errors_that_are_meant_escape_and_memory_is_bounded(tmp_path: Path) -> None:
    seconds = examples(30, 300)
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(seeds()):
        (corpus / str(number)).write_bytes(seed)
    command = [
        sys.executable, "-m", "tests.fuzz.frames", str(corpus), f"-max_total_time={seconds}", "-max_len=8192",
        f"-rss_limit_mb={RSS_LIMIT_MIB}", f"-artifact_prefix={tmp_path}/", "-print_final_stats=1", "-seed=1",
    ]  # fmt: skip
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=seconds + 120, check=False
    )
    found = [path.read_bytes().hex() for path in tmp_path.glob("*-*")]
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}\n{found}"
    runs = re.search(r"stat::number_of_executed_units:\s*(\d+)", done.stderr)
    assert runs is not None
    print(f"{runs[1]} inputs in {seconds} s")
    assert int(runs[1]) > 1000
