"""Options of the whole suite, and how two processes share it.

Two processes take turns at the files, since fixtures are made for a file. All of `tests/chaos` counts as one file: its
daemons want the machine and would disturb one another. Named paths run in one process, as does `-m chaos`.
"""

import os
from pathlib import Path

import pytest

from tests.budget import LONG_VARIABLE

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
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            room = _room(item.path)
            item.add_marker(pytest.mark.xdist_group("chaos" if room == "chaos" else f"{room}/{item.path.stem}"))


def _room(path: Path) -> str:
    return path.relative_to(TESTS).parts[0]


def _turn(path: Path) -> int:
    room = _room(path)
    return ORDER.index(room) if room in ORDER else len(ORDER)
