"""Every key that can be set is read by what builds the daemon: a key that nothing reads would be a lie."""

import ast
from functools import cache
from pathlib import Path

import pytest

import helixd
from helixd.config.load import SCHEMA
from helixd.config.schema import KeyPath

ROOM = Path(helixd.__file__).parent
# What these decide, they decide within the configuration itself.
WITHIN = {
    ("role",): "sections.py",
    ("api", "insecure_open"): "checks.py",
    ("cluster", "insecure_open"): "checks.py",
}


@cache
def reads(*files: str) -> frozenset[tuple[str, str]]:
    """Every attribute read in these files, with the name of what it is read from: `config.node.name` is node, name."""
    found = set()
    for file in files:
        for read in ast.walk(ast.parse((ROOM / file).read_text(encoding="utf-8"))):
            if isinstance(read, ast.Attribute) and isinstance(read.value, ast.Attribute | ast.Name):
                holder = read.value.attr if isinstance(read.value, ast.Attribute) else read.value.id
                found.add((holder, read.attr))
    return frozenset(found)


@pytest.mark.parametrize("path", sorted(SCHEMA.keys), ids=".".join)
def test_a_key_is_read(path: KeyPath) -> None:
    files = (f"config/{WITHIN[path]}",) if path in WITHIN else ("assembly.py", "settings.py", "daemon.py", "cli.py")
    holder = path[-2] if len(path) > 1 else "self"
    assert (holder, SCHEMA.keys[path].attribute) in reads(*files)
