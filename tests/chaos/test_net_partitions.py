"""Hosts that are stopped, cut off, or heard one way only: C2 to C5, and links that are lost while their ends live.

Three stages with two replicas each, every daemon on a host of its own network. The oracle is `transformers`.
"""

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.budget import examples
from tests.faults.cluster import HUB, NetDaemons, net_daemons
from tests.faults.load import Load, load, until
from tests.faults.namespaces import why_not

pytestmark = pytest.mark.chaos

STREAMS = examples(8, 16)
NEW = examples(96, 128)
PROMPTS = [
    [(number * 7 + at) % 90 + 35 for at in range(4 + 5 * (number % 8) + number // 8)] for number in range(STREAMS)
]
"""Letters: what begins in a prompt as half a character, an answer would complete."""
STAGES = {"a1": (0, 2), "a2": (0, 2), "b1": (2, 4), "b2": (2, 4), "c1": (4, 6), "c2": (4, 6)}
DEAD_AFTER_S = 3.0
SHORT_S = 1.0
"""A partition that nobody is to be declared dead for."""
LONG_S = examples(6, 30)
"""One that outlasts the silence."""
HOP_S = 0.006
"""What a packet takes from host to host: it paces the streams, so that faults hit them."""
REJOIN_S = 10.0
MARGIN_S = 7.0
"""For computing again, and a busy machine; far less than the step deadline (60 s) or what ends the fault."""


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Iterator[NetDaemons]:
    if reason := why_not():
        pytest.skip(reason)
    with net_daemons(tmp_path_factory.mktemp("net"), list(STAGES)) as made:
        made.pinned_cluster(checkpoint, STAGES, "--set", f"cluster.timers.dead_after={DEAD_AFTER_S}s",
                            worker=("--set", f"cluster.timers.dead_after={DEAD_AFTER_S}s"))  # fmt: skip
        made.wait_ready()
        yield made


@pytest.fixture
def made(running: NetDaemons) -> Iterator[NetDaemons]:
    """All six up, linked and idle; afterwards again, with nothing left of any request and nothing loaded twice."""
    running.net.heal()
    whole(running)
    loaded = weight_bytes(running)
    running.net.everywhere(delay_s=HOP_S)
    yield running
    print(running.tails())
    running.net.heal()
    whole(running)
    running.wait_idle()
    assert weight_bytes(running) == loaded


def whole(made: NetDaemons) -> None:
    def complete() -> bool:
        view = made.get("/cluster")
        return (
            len(view["nodes"]) == len(STAGES)
            and all((node["confirmed"] or {}).get("state") == "ready" and node["load"] for node in view["nodes"])
            and not any(link["error"] for link in view["links"])
        )

    made.wait(complete, "all nodes and links to be up", 90)


def weight_bytes(made: NetDaemons) -> dict[str, int]:
    return {node["id"]: node["load"]["weight_bytes_loaded"] for node in made.get("/cluster")["nodes"]}


def stale_frames(made: NetDaemons) -> int:
    return sum(node["load"]["stale_frames"] for node in made.get("/cluster")["nodes"] if node["load"])


def failovers(made: NetDaemons) -> int:
    return int(made.get("/cluster")["requests"]["failovers"])


def node_ids(made: NetDaemons) -> set[str]:
    return {node["id"] for node in made.get("/cluster")["nodes"]}


def events(made: NetDaemons, *names: str) -> list[str]:
    """The coordinator's log lines of these events."""
    return [line for line in made.all[HUB].text.splitlines() if any(f" {name} " in line for name in names)]


def assert_short(under: Load, figures: str) -> None:
    """No client waited longer than finding out and computing again may take."""
    print(f"{figures}: longest pause {under.longest_gap_s:.2f} s, mean {under.mean_gap_s * 1000:.0f} ms")
    assert under.longest_gap_s < DEAD_AFTER_S + MARGIN_S


def test_c2_a_stopped_worker_is_left_behind_and_its_late_words_count_for_nothing(
    made: NetDaemons, texts: list[str]
) -> None:
    before = failovers(made)
    with load(made, PROMPTS, NEW) as under:
        under.reach(5)
        victim = under.most_used(["b1", "b2"])
        made.all[victim].signal(signal.SIGSTOP)
        stopped_s = time.monotonic()
    under.assert_whole(texts)
    assert_short(under, "C2")
    assert node_ids(made) == set(STAGES) - {victim}
    assert failovers(made) > before
    time.sleep(max(0.0, stopped_s + LONG_S - time.monotonic()))
    # It wakes amid other streams, with rows and tokens to send that nobody waits for any more.
    with load(made, PROMPTS, NEW) as under:
        under.reach(2)
        made.all[victim].signal(signal.SIGCONT)
        woken_s = time.monotonic()
        until(lambda: victim in node_ids(made), "the worker to be back", REJOIN_S + MARGIN_S)
        print(f"C2: back {time.monotonic() - woken_s:.1f} s after it went on")
    under.assert_whole(texts)
    print(f"C2: {stale_frames(made)} stale frames")


def test_c3_a_partition_shorter_than_the_silence_moves_nothing(made: NetDaemons, texts: list[str]) -> None:
    before, lost = failovers(made), len(events(made, "worker_lost", "link_lost"))
    with load(made, PROMPTS, NEW) as under:
        under.reach(5)
        made.isolate(under.most_used(["b1", "b2"]))
        time.sleep(SHORT_S)
        made.net.everywhere(up=True)
    under.assert_whole(texts)
    print(f"C3: longest pause {under.longest_gap_s:.2f} s")
    assert under.longest_gap_s >= SHORT_S / 2, "the partition hit no stream"
    assert failovers(made) == before
    assert len(events(made, "worker_lost", "link_lost")) == lost


def test_c4_a_worker_that_was_cut_off_is_back_soon_and_loads_nothing(made: NetDaemons, texts: list[str]) -> None:
    with load(made, PROMPTS, NEW) as under:
        under.reach(5)
        victim = under.most_used(["b1", "b2"])
        made.isolate(victim)
        cut_s = time.monotonic()
    under.assert_whole(texts)
    assert_short(under, "C4")
    assert node_ids(made) == set(STAGES) - {victim}
    time.sleep(max(0.0, cut_s + LONG_S - time.monotonic()))
    with load(made, PROMPTS, NEW) as under:
        under.reach(2)
        made.net.everywhere(up=True)
        healed_s = time.monotonic()
        until(lambda: victim in node_ids(made), "the worker to be back", REJOIN_S + MARGIN_S)
        print(f"C4: back {time.monotonic() - healed_s:.1f} s after the partition")
    under.assert_whole(texts)


@pytest.mark.parametrize("mute", ["worker", "coordinator"])
def test_c5_a_worker_that_is_heard_one_way_only_is_lost(made: NetDaemons, texts: list[str], mute: str) -> None:
    """A last stage whose tokens do not arrive, and a first one that is not told what to do."""
    with load(made, PROMPTS, NEW) as under:
        under.reach(5)
        victim = under.most_used(["c1", "c2"] if mute == "worker" else ["a1", "a2"])
        ends = [victim, HUB] if mute == "worker" else [HUB, victim]
        made.net.between(ends[:1], ends[1:], back=False, up=False)
        cut_s = time.monotonic()
        until(lambda: victim not in node_ids(made), "the worker to be lost", DEAD_AFTER_S + MARGIN_S)
        print(f"C5, mute {mute}: marked down after {time.monotonic() - cut_s:.1f} s")
    under.assert_whole(texts)
    assert_short(under, f"C5, mute {mute}")
    assert under.longest_gap_s > DEAD_AFTER_S / 2, "the fault hit no stream"


def test_c5_links_that_are_lost_one_way_are_driven_around_and_their_ends_serve_on(
    made: NetDaemons, texts: list[str]
) -> None:
    """One link loses the way rows take, the other one the way acknowledgements take."""
    lost = len(events(made, "worker_lost"))
    with load(made, PROMPTS, NEW) as under:
        under.reach(5)
        forth, back = disjoint(under)
        made.net.between([forth[0]], [forth[1]], back=False, up=False)
        made.net.between([back[1]], [back[0]], back=False, up=False)
        cut_s = time.monotonic()
        cut = {" - ".join(forth), " - ".join(back)}
        until(lambda: unusable(made) == cut, "both links to be marked", DEAD_AFTER_S + MARGIN_S)
        print(f"C5, links: marked down after {time.monotonic() - cut_s:.1f} s")
    under.assert_whole(texts)
    assert_short(under, "C5, links")
    assert under.longest_gap_s > DEAD_AFTER_S / 2, "the fault hit no stream"
    assert len(events(made, "worker_lost")) == lost
    assert node_ids(made) == set(STAGES)
    with load(made, PROMPTS, NEW) as under:
        pass
    under.assert_whole(texts)
    used = onward(under)
    assert used.isdisjoint({forth, back})
    assert {b for b, _ in used} == {"b1", "b2"}


def test_links_without_an_alternative_are_relayed_and_the_streams_go_on(made: NetDaemons, texts: list[str]) -> None:
    lost = len(events(made, "worker_lost"))
    with load(made, PROMPTS, NEW) as under:
        under.reach(5)
        made.net.between(["b1", "b2"], ["c1", "c2"], up=False)
        cut_s = time.monotonic()
        until(lambda: made.get("/cluster")["plan"]["relayed"] != [], "a plan that relays", 60)
        print(f"relay: planned {time.monotonic() - cut_s:.1f} s after the links were lost")
    under.assert_whole(texts)
    print(f"relay: longest pause {under.longest_gap_s:.2f} s")
    view = made.get("/cluster")
    assert view["relay"]["carried_frames"] > 0
    assert len(events(made, "worker_lost")) == lost
    assert any("relayed" in (node["note"] or "") for node in view["nodes"])
    # They are asked again, reach each other, and nobody notices that the detour is over.
    with load(made, PROMPTS, NEW) as under:
        made.net.everywhere(up=True)
    under.assert_whole(texts)
    made.wait(lambda: made.get("/cluster")["plan"]["relayed"] == [], "a plan without relays", 90)
    with load(made, PROMPTS, NEW) as under:
        pass
    under.assert_whole(texts)


def onward(under: Load) -> set[tuple[str, str]]:
    """The links between second and third stages that routes lead over."""
    routes = [[hop.split("[")[0] for hop in stream.route.split(" -> ")] for stream in under.streams]
    return {(b, c) for _, b, c in routes}


def disjoint(under: Load) -> tuple[tuple[str, str], tuple[str, str]]:
    """Two such links without a node in common; the first one is used, the other one if it can be."""
    used = sorted(onward(under))
    for one in used:
        for other in used:
            if one[0] != other[0] and one[1] != other[1]:
                return one, other
    b, c = used[0]
    return (b, c), ("b1" if b == "b2" else "b2", "c1" if c == "c2" else "c2")


def unusable(made: NetDaemons) -> set[str]:
    """Pairs with a link that is marked unusable, either way."""
    return {" - ".join(sorted((link["src"], link["dst"]))) for link in made.get("/cluster")["links"] if link["error"]}
