"""Workers behind NAT call and are not called: who can dial does, pairs that cannot are planned around, else relayed.

Two stages with two replicas each, of which one is behind NAT in either stage. The oracle is `transformers`.
"""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.budget import LONG
from tests.faults.cluster import HUB, NetDaemons, net_daemons
from tests.faults.load import load, until
from tests.faults.namespaces import why_not

pytestmark = pytest.mark.chaos

NEW = 96
PROMPTS = [[number * 7 % 90 + 35 + at for at in range(4 + 5 * number)] for number in range(8)]
STAGES = {"anat": (0, 3), "aopen": (0, 3), "bnat": (3, 6), "bopen": (3, 6)}
HIDDEN = ("anat", "bnat")
HOP_S = 0.005
DIAL_TIMEOUT_S = 5.0


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Iterator[NetDaemons]:
    if reason := why_not():
        pytest.skip(reason)
    with net_daemons(tmp_path_factory.mktemp("net"), list(STAGES)) as made:
        made.net.close_in(*HIDDEN)
        made.net.everywhere(delay_s=HOP_S)
        made.pinned_cluster(checkpoint, STAGES)
        made.wait_ready()
        yield made


@pytest.fixture
def made(running: NetDaemons) -> Iterator[NetDaemons]:
    running.wait(lambda: known(running), "all links to be known", 90)
    yield running
    print(running.tails())
    running.wait_idle()


def links(made: NetDaemons) -> dict[tuple[str, str], str | None]:
    """What is wrong with the link, by its ends."""
    return {(link["src"], link["dst"]): link["error"] for link in made.get("/cluster")["links"]}


def known(made: NetDaemons) -> bool:
    """Everybody serves, and reaches everybody but those behind NAT one another."""
    view = made.get("/cluster")
    if len(view["nodes"]) < len(STAGES) or any(
        (node["confirmed"] or {}).get("state") != "ready" or not node["load"] for node in view["nodes"]
    ):
        return False
    errors = {frozenset(pair) for pair, error in links(made).items() if error}
    return errors == {frozenset(HIDDEN)}


def hops(routes: set[str]) -> set[tuple[str, str]]:
    """Which worker leads to which in these routes."""
    found = set()
    for route in routes:
        one, other = (hop.split("[")[0] for hop in route.split(" -> "))
        found.add((one, other))
    return found


def test_whoever_can_dial_does_and_those_who_cannot_are_planned_around(made: NetDaemons, texts: list[str]) -> None:
    with load(made, PROMPTS, NEW) as under:
        pass
    under.assert_whole(texts)
    used = hops({stream.route for stream in under.streams})
    assert ("anat", "bnat") not in used
    assert {"anat", "bnat"} <= {name for pair in used for name in pair}, "both are of use"
    view = made.get("/cluster")
    assert view["plan"]["relayed"] == []
    assert view["relay"]["carried_frames"] == 0


@pytest.mark.parametrize("victim", ["bopen", *(["aopen"] if LONG else [])])
def test_links_are_made_again_from_the_side_that_can(made: NetDaemons, texts: list[str], victim: str) -> None:
    """The one that is open has a new life: those behind NAT must call it, whichever end of the link it is.

    Nobody calls a link lost that the other end has made.
    """
    before = lost_links(made)
    with load(made, PROMPTS, NEW) as under:
        under.reach(5)
        made.all[victim].kill()
        made.restart(victim)
    under.assert_whole(texts)
    made.wait(lambda: known(made), "all links to be known again", 90)

    def used() -> bool:
        with load(made, PROMPTS, 2) as again:
            pass
        [other] = [name for name in HIDDEN if name[0] != victim[0]]
        return tuple(sorted((victim, other))) in hops({stream.route for stream in again.streams})

    made.wait(used, "the link to be used again", 60)
    time.sleep(DIAL_TIMEOUT_S + 1)
    assert lost_links(made) == before


@pytest.mark.skipif(not LONG, reason="probing again is tested in test_net_partitions.py; from behind NAT with --long")
def test_links_that_were_lost_are_made_again_from_the_side_that_can(made: NetDaemons, texts: list[str]) -> None:
    made.net.between(HIDDEN, ["aopen", "bopen"], up=False)
    until(lambda: ("anat", "bopen") in bad(made) and ("aopen", "bnat") in bad(made), "the links to be lost")
    made.net.between(HIDDEN, ["aopen", "bopen"], up=True)
    made.wait(lambda: known(made), "all links to be known again", 90)
    with load(made, PROMPTS, NEW) as under:
        pass
    under.assert_whole(texts)


def lost_links(made: NetDaemons) -> list[str]:
    """Those that were lost while both ends live."""
    return [line for line in made.all[HUB].text.splitlines() if " link_lost " in line and "10.77" in line]


def bad(made: NetDaemons) -> set[tuple[str, str]]:
    return {pair for pair, error in links(made).items() if error}


def test_those_who_cannot_are_relayed_when_nobody_else_is_left(made: NetDaemons, texts: list[str]) -> None:
    with load(made, PROMPTS, NEW) as under:
        under.reach(5)
        for name in ("aopen", "bopen"):
            made.all[name].kill()
    under.assert_whole(texts)
    view = made.get("/cluster")
    assert view["plan"]["relayed"] == [["anat", "bnat"]]
    assert {tuple(sorted((e["src"], e["dst"]))) for e in view["links"] if e["relayed"]} == {("anat", "bnat")}
    assert view["relay"]["carried_frames"] > 0
    assert any("pass through the coordinator" in (node["note"] or "") for node in view["nodes"])
    for name in ("aopen", "bopen"):
        made.restart(name)
    made.wait(lambda: made.get("/cluster")["plan"]["relayed"] == [] and known(made), "a plan without relays", 120)
    with load(made, PROMPTS, NEW) as under:
        pass
    under.assert_whole(texts)
