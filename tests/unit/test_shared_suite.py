"""Where processes share the suite, a file's tests stay together: else each process makes the file's fixtures anew."""

import pytest

from tests.conftest import group


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
