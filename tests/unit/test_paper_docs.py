"""docs/paper.md and its pictures are what the script makes of the committed figures, and somebody points to them."""

import json
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

sys.path.append(str(Path(__file__).parents[2] / "scripts"))

import paper_page

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "paper"
DATA = json.loads((FOLDER / "figures.json").read_text())


def test_the_page_says_what_the_figures_say() -> None:
    assert (ROOT / "docs" / "paper.md").read_text() == paper_page.page(DATA)


def test_the_pictures_are_drawn_from_the_figures_and_all_there() -> None:
    drawn = paper_page.pictures(DATA)
    assert {path.name for path in FOLDER.glob("*.svg")} == drawn.keys()
    for name, text in drawn.items():
        assert (FOLDER / name).read_text() == text
        ElementTree.fromstring(text)
        assert len(text) < 60_000
    shown = set(re.findall(r"\(paper/([\w-]+\.svg)\)", (ROOT / "docs" / "paper.md").read_text()))
    assert shown == drawn.keys()


def test_every_cluster_has_throughput_and_latency_beside_the_papers() -> None:
    assert len(DATA["offline"]) == 3
    for cluster in DATA["offline"]:
        groups = paper_page._groups(DATA, cluster)
        assert len(groups) == 3
        for bars in groups.values():
            assert {ours for *_, ours in bars} == {True, False}
            assert all(value > 0 for _, value, _, _ in bars)


def test_the_readme_points_to_the_page() -> None:
    assert "(docs/paper.md)" in (ROOT / "README.md").read_text()
