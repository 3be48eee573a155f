"""Cluster files that no parser can read: one line that names the file, whatever the parser made of it."""

from pathlib import Path

import pytest

from helixd.commands.cluster_source import load_cluster
from helixd.commands.failure import CommandFailed
from helixd.exits import Exit


@pytest.mark.parametrize("name", ["c.toml", "c.json"])
@pytest.mark.parametrize("value", ["1" * 5000, "[" * 50_000])
def test_what_ends_a_parser_is_a_file_that_makes_no_sense(name: str, value: str, tmp_path: Path) -> None:
    """Neither a number of thousands of digits nor brackets thousands deep are errors of syntax to `tomllib`."""
    path = tmp_path / name
    path.write_text(f"format = {value}" if name.endswith("toml") else f'{{"format": {value}}}')
    with pytest.raises(CommandFailed) as caught:
        load_cluster(path)
    assert caught.value.status == Exit.BAD_DATA
    assert str(caught.value).startswith(f"{path}: ")
