"""Options of the whole suite."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--long", action="store_true", help="property tests and fuzzing at full length: minutes, not seconds"
    )


@pytest.fixture
def long(request: pytest.FixtureRequest) -> bool:
    """Whether the suite runs at full length."""
    return bool(request.config.getoption("--long"))
