"""Connections that are reset, corrupted, cut and held one way, by proxies between real daemons: this needs no root.

Links are encrypted: a byte that changes on the way breaks its link, where without TLS only TCP's checksum stands
between it and a wrong answer. The oracle is `transformers`.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.budget import LONG
from tests.certificates import Authority, needs_openssl
from tests.daemons import Daemons, daemons, free_port
from tests.faults.load import load, until
from tests.faults.proxy import ChaosProxy, Lane, proxy

pytestmark = [pytest.mark.chaos, needs_openssl]

NEW = 96
PROMPTS = [[number * 7 % 90 + 35 + at for at in range(4 + 5 * number)] for number in range(8)]
STAGES = {"a1": (0, 3), "a2": (0, 3), "b": (3, 6)}
DEAD_AFTER_S = 2.0
MARGIN_S = 7.0
PACE_S = 0.01
"""Each way between the coordinator and a worker: it paces the streams, so that faults hit them."""


@dataclass
class Cables:
    """`hub`: from each worker to the coordinator; `data`: to each worker from the others.

    That of b refuses: b is not called, so a link to it is always a call of its own, over the other end's cable.
    """

    made: Daemons
    hub: dict[str, ChaosProxy]
    data: dict[str, ChaosProxy]

    def heal(self) -> None:
        for cable in (*self.hub.values(), *self.data.values()):
            cable.heal()
        self.data["b"].refusing = True

    @property
    def errors(self) -> set[frozenset[str]]:
        """The pairs whose link is marked unusable."""
        return {frozenset((link["src"], link["dst"])) for link in self.made.get("/cluster")["links"] if link["error"]}

    @property
    def nodes(self) -> set[str]:
        return {node["id"] for node in self.made.get("/cluster")["nodes"]}

    def whole(self) -> bool:
        view = self.made.get("/cluster")
        ready = [(node["confirmed"] or {}).get("state") == "ready" and node["load"] for node in view["nodes"]]
        return len(ready) == len(STAGES) and all(ready) and not self.errors


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Iterator[Cables]:
    ca = Authority.make(tmp_path_factory.mktemp("ca"))

    def tls(name: str) -> list[str]:
        pair = ca.sign(f"DNS:{name}")
        files = {"ca": ca.cert, "cert": pair.cert, "key": pair.key}
        words = [f"cluster.tls.{key}={path}" for key, path in files.items()]
        return [word for each in [*words, f"node.id={name}"] for word in ("--set", each)]

    with daemons(tmp_path_factory.mktemp("daemons")) as made, ExitStack() as stack:
        config = made.home / "cluster.toml"
        pins = "".join(f'[planner.pins."{name}"]\nrange = [{a}, {b}]\n' for name, (a, b) in STAGES.items())
        timers = f'[cluster.timers]\ndead_after = "{DEAD_AFTER_S}s"\n'
        config.write_text(f"[planner]\nwait_for_nodes = {len(STAGES)}\n{pins}{timers}")
        made.coordinator(checkpoint, "--config", str(config), *tls("boss"))
        host, port = made.peers.split(":")
        cables = Cables(made, {}, {})
        for name in STAGES:
            peer_port = free_port()
            cables.hub[name] = stack.enter_context(proxy((host, int(port))))
            cables.data[name] = stack.enter_context(proxy(("127.0.0.1", peer_port)))
            cables.data[name].refusing = name == "b"
            made.start(
                name, "--role", "worker", "--coordinator", cables.hub[name].address, "--memory", "8MiB", "--device",
                "cpu", "--peer-listen", f"127.0.0.1:{peer_port}", "--config", str(config), *tls(name),
                "--set", f"cluster.advertise={cables.data[name].address}",
            )  # fmt: skip
        made.wait_ready()
        yield cables


@pytest.fixture
def cables(running: Cables) -> Iterator[Cables]:
    running.heal()
    running.made.wait(running.whole, "all nodes and links to be up", 90)
    for cable in running.hub.values():
        cable.there.delay_s = cable.back.delay_s = PACE_S
    yield running
    print(running.made.tails())
    running.heal()
    running.made.wait(running.whole, "all nodes and links to be up again", 90)
    running.made.wait_idle()


def reset(cable: ChaosProxy) -> None:
    cable.reset()


def corrupt(cable: ChaosProxy) -> None:
    """A byte from the side that sends rows and tokens."""
    lane: Lane = cable.back
    lane.corrupt_in_bytes = 700


def corrupt_there(cable: ChaosProxy) -> None:
    cable.there.corrupt_in_bytes = 700


def hold(cable: ChaosProxy) -> None:
    """Nothing that the worker says arrives, all that is said to it does."""
    cable.there.blocked = True


@pytest.mark.parametrize(
    ("victim", "link_fault", "hub_fault"), [("a1", corrupt, corrupt_there), *([("a2", reset, hold)] if LONG else [])]
)  # fmt: skip
def test_a_bad_cable_costs_its_link_and_no_stream(
    cables: Cables, texts: list[str], victim: str,
    link_fault: Callable[[ChaosProxy], None], hub_fault: Callable[[ChaosProxy], None],
) -> None:  # fmt: skip
    """First one between two workers, which both serve on, then the one to the coordinator, which loses the worker."""
    made = cables.made
    with load(made, PROMPTS, NEW) as under:
        under.reach(5)
        link_fault(cables.data[victim])
        until(lambda: frozenset((victim, "b")) in cables.errors, "the link to be marked")
        assert victim in cables.nodes, "its link is lost, the worker is not"
    under.assert_whole(texts)
    assert under.longest_gap_s < DEAD_AFTER_S + MARGIN_S
    with load(made, PROMPTS, NEW) as under:
        pass
    under.assert_whole(texts)
    assert not any(f"{victim}[" in stream.route for stream in under.streams)

    lost = made.all["coordinator"].text.count(" worker_lost ")
    cables.data[victim].heal()
    hub_fault(cables.hub[victim])
    until(lambda: made.all["coordinator"].text.count(" worker_lost ") > lost, "the worker to be lost")
    cables.hub[victim].heal()
    with load(made, PROMPTS, NEW) as under:
        pass
    under.assert_whole(texts)


def test_a_cut_shorter_than_the_silence_moves_nothing(cables: Cables, texts: list[str]) -> None:
    """C3 without root: every cable of a worker at once."""
    before = cables.made.get("/cluster")["requests"]["failovers"]
    with load(cables.made, PROMPTS, NEW) as under:
        under.reach(5)
        for cable in (cables.hub["a1"], cables.data["a1"]):
            cable.cut()
        time.sleep(DEAD_AFTER_S / 4)
        for cable in (cables.hub["a1"], cables.data["a1"]):
            cable.heal()
    under.assert_whole(texts)
    assert under.longest_gap_s >= DEAD_AFTER_S / 8, "the cut hit no stream"
    assert cables.made.get("/cluster")["requests"]["failovers"] == before
    assert not cables.errors
