"""Options of the whole suite, and how two processes share it.

Two processes take turns at the files, since fixtures are made for a file. All of `tests/chaos` counts as one file: its
daemons want the machine and would disturb one another. Named paths run in one process, as does `-m chaos`.
"""

import os
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

# Read by tests/budget.py when it is first imported, which is not to be before this is set.
LONG_VARIABLE = "HELIXD_TESTS_LONG"
PROCESSES = 2
TESTS = Path(__file__).parent
# Long ones first: a long one that begins last leaves the other process idle.
ORDER = ("chaos", "vtime", "functional", "unit")

# Several daemons share the machine in a test: more threads each would only make them wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--long", action="store_true", help="property tests and fuzzing at full length (see tests/budget.py): minutes"
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--long"):
        os.environ[LONG_VARIABLE] = "1"


@pytest.fixture(autouse=True)
def _wide_as_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables are printed as to a pipe: readline, where something imports it, puts a width into the environment."""
    monkeypatch.delenv("COLUMNS", raising=False)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    if config.args_source == pytest.Config.ArgsSource.ARGS or config.option.markexpr == "chaos":
        config.option.dist = "no"
        return 0
    return PROCESSES


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: _turn(item.path))


class ByFile(LoadScopeScheduling):
    """Files are handed out one by one, in order; parts of a long one that share nothing are files of their own."""

    def _split_scope(self, nodeid: str) -> str:
        return group(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    return ByFile(config, log)


def group(nodeid: str) -> str:
    """What is to run in one process with the test of this id."""
    file = nodeid.partition("::")[0]
    if "tests/chaos/" in file:
        return "tests/chaos"
    return nodeid if file.endswith("vtime/test_machine.py") else file


def _turn(path: Path) -> int:
    room = path.relative_to(TESTS).parts[0]
    return ORDER.index(room) if room in ORDER else len(ORDER)
