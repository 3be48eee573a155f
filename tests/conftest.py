"""Options of the whole suite."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--long", action="store_true", help="property tests and fuzzing at full length (see tests/budget.py): minutes"
    )
