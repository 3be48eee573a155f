"""docs/operations.md and --help say what the daemon does: statuses, and the keys a reload takes."""

import re
import tomllib
from pathlib import Path

import pytest

from helixd.cli import build_parser
from helixd.config.load import SCHEMA
from helixd.config.reload import RELOADABLE
from helixd.exits import Exit

ROOT = Path(__file__).parents[2]
DOCS = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")


# 66 and 69 are those of `helixd plan`.
DAEMONS = set(Exit) - {Exit.NO_INPUT, Exit.INFEASIBLE}


def section(title: str) -> str:
    return DOCS.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_every_status_is_documented_and_restarted_as_documented() -> None:
    rows = dict(re.findall(r"^\| (\d+) \|.*\| (yes|no|) ?\|$", section("Exit statuses"), re.MULTILINE))
    assert set(map(int, rows)) == DAEMONS
    unit = (ROOT / "scripts" / "systemd" / "helixd.service").read_text(encoding="utf-8")
    [prevented] = re.findall(r"^RestartPreventExitStatus=(.*)$", unit, re.MULTILINE)
    assert {status for status, again in rows.items() if again == "no"} == set(prevented.split())
    told = build_parser().format_help().split("exit status:")[1]
    assert set(map(int, re.findall(r"\b\d+\b", told))) == DAEMONS


def test_the_keys_a_reload_takes_are_documented() -> None:
    table = section("Reloading").split("| Keys |")[1].split("\n\n")[0]
    assert set(re.findall(r"`([\w.]+)`", table)) == {".".join(path) for path in RELOADABLE}


@pytest.mark.parametrize("name", ["SECURITY.md", "docs/operations.md", "docs/limits.md"])
def test_what_is_named_exists(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    files = set(re.findall(r"(?:scripts|tests|docs)/[\w./-]+\w", text))
    files |= {str(Path(name).parent / target) for target in re.findall(r"\]\(([^)]+)\)", text) if "://" not in target}
    assert [file for file in files if not (ROOT / file).exists()] == []
    sections = {".".join(path[:n]) for path in SCHEMA.keys for n in range(1, len(path) + 1)}
    keys = set(re.findall(r"`((?:api|cluster|log|node|planner|engine|model)\.[\w.]+)`", text)) - {"cluster.secret"}
    assert keys <= sections
    for toml in re.findall(r"^```toml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        for table, values in tomllib.loads(toml).items():
            assert {f"{table}.{key}" for key in values} <= sections


def test_every_fault_names_tests_that_exist() -> None:
    rows = [line.split("|")[1:-1] for line in (ROOT / "docs" / "faults.md").read_text().splitlines() if "| `" in line]
    assert len(rows) > 30
    for fault, _, _, tests in rows:
        files = re.findall(r"`(\w+/test_\w+\.py)`", tests)
        assert files, fault
        assert [file for file in files if not (ROOT / "tests" / file).exists()] == [], fault
