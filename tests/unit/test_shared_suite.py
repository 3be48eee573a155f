"""Where processes share the suite, a file's tests stay together: else each process makes the file's fixtures anew."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import group

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("nodeid", "where"),
    [
        ("tests/unit/test_a.py::test_b", "tests/unit/test_a.py"),
        ("tests/unit/test_a.py::TestB::test_c[1]", "tests/unit/test_a.py"),
        ("tests/chaos/test_a.py::test_b", "tests/chaos"),
        ("tests/chaos/test_c.py::test_d", "tests/chaos"),
        ("tests/vtime/test_machine.py::test_a[1]", "tests/vtime/test_machine.py::test_a[1]"),
        ("tests/vtime/test_found.py::test_a[1]", "tests/vtime/test_found.py"),
    ],
)
def test_what_stays_together(nodeid: str, where: str) -> None:
    assert group(nodeid) == where


def test_long_runs_are_long_where_a_path_is_named() -> None:
    """In the process that was started, too: what says how long is read when the first test file is."""
    counted = []
    for option in ([], ["--long"]):
        command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *option, "tests/chaos/test_storm.py"]
        listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=60).stdout
        counted.append(listed.count("::test_c21"))
    assert 0 < counted[0] < counted[1]
