"""The line of a key, in JSON and in TOML."""

import pytest

from helixd.commands.positions import line_of

JSON = """{
  "format": "x", "model": {
    "layers": 3
  },
  "nodes": [
    {"id": "a,b]", "type": "t"},
    {"id": "b",
     "type": "t \\" }"}
  ],
  "links": [["a", "b", 1, 2],
            ["b", "a", 1, 2]],
  "node_types": {"RTX 4090.x": {"points": [[1, 2],
    [3, 4]]}}
}
"""

TOML = """# a cluster
format = "x"
model.layers = 3
links = [ # all of them
  ["a", "b", 1, 2], # one = first
  ["b", 'a', 1, 2],
]

[[nodes]]
id = "a"
[[nodes]]
id = "b"
type = "t"
place = { row = 1, rack = "]" }

[node_types."RTX 4090.x"]
memory_bytes = 5
"""


@pytest.mark.parametrize(
    ("key", "line"),
    [
        ("format", 2),
        ("model.layers", 3),
        ("nodes[0].id", 6),
        ("nodes[1]", 7),
        ("nodes[1].type", 8),
        ("links[0]", 10),
        ("links[1]", 11),
        ("links[1][2]", 11),
        ("node_types.RTX 4090.x.points[1]", 13),
        ("node_types.RTX 4090.x.missing", 12),
        ("nodes[1].missing", 7),
        ("missing", None),
        ("nodesy", None),
    ],
)
def test_lines_of_json(key: str, line: int | None) -> None:
    assert line_of(JSON, key, toml=False) == line


@pytest.mark.parametrize(
    ("key", "line"),
    [
        ("format", 2),
        ("model.layers", 3),
        ("links[0]", 5),
        ("links[1]", 6),
        ("links[1][0]", 6),
        ("nodes[0].id", 10),
        ("nodes[1].id", 12),
        ("nodes[1].type", 13),
        ("nodes[1].place.rack", 14),
        ("nodes[1].missing", 11),
        ("node_types.RTX 4090.x.memory_bytes", 17),
        ("node_types.RTX 4090.x.missing", 16),
        ("missing", None),
    ],
)
def test_lines_of_toml(key: str, line: int | None) -> None:
    assert line_of(TOML, key, toml=True) == line
