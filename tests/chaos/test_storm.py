"""Workers come, go, die, stand still and are cut off, coordinators die, clients come and leave, at random (C21)."""

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import pytest

from tests.budget import examples
from tests.chaos.asker import Question
from tests.chaos.storm import Storm
from tests.chaos.streams import clear_checkpoint, reference_text
from tests.daemons import Daemons, daemons
from tests.faults.proxy import ChaosProxy, proxy

pytestmark = pytest.mark.chaos

SEEDS = examples(3, 20)
STEPS = examples(50, 500)
WORKERS = 4
MOST_LAYERS = 3
NEW = (24, 48, 96)


@dataclass(frozen=True)
class Cluster:
    made: Daemons
    workers: dict[str, list[str]]
    lines: dict[str, ChaosProxy]
    questions: list[Question]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    home = tmp_path_factory.mktemp("storm")
    path = home / "m"
    questions = [
        Question(prompt, new, reference_text(path, prompt, new))
        for prompt, new in zip(clear_checkpoint(path, 9, max(NEW)), 3 * NEW, strict=True)
    ]
    with ExitStack() as stack:
        made = stack.enter_context(daemons(home))
        timers = ("--set", "cluster.timers.dead_after=2s")
        pins = "".join(f'[planner.pins."w{n}"]\nmax_layers = {MOST_LAYERS}\n' for n in range(WORKERS))
        (home / "helixd.toml").write_text(pins)
        made.coordinator(
            path, "--config", str(home / "helixd.toml"), *timers, "--set", "cluster.timers.failover_wait=20s",
            "--set", "planner.wait_for_nodes=2", "--set", "planner.replan_cooldown=2s",
            "--set", "planner.time_limit=2s",
        )  # fmt: skip
        host, port = made.peers.split(":")
        names = [f"w{number}" for number in range(WORKERS)]
        lines = {name: stack.enter_context(proxy((host, int(port)))) for name in names}
        workers = {}
        for name, line in lines.items():
            made.peers = line.address
            workers[name] = made.worker(name, "8MiB", *timers, "--set", "cluster.timers.join_retry_max=1s").arguments
        made.wait_ready()
        yield Cluster(made, workers, lines, questions)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_c21_a_cluster_of_processes_comes_right_again_whatever_happens_to_it(cluster: Cluster, seed: int) -> None:
    storm = Storm(cluster.made, cluster.workers, cluster.lines, cluster.questions, seed)
    for _ in range(STEPS):
        storm.step()
    storm.settle()
    ends = Counter(client.ends[0] for client in storm.clients)
    said = Counter(client.detail for client in storm.clients if client.ends[0] in ("error", "refused"))
    print(f"C21 seed {seed}: {STEPS} steps {dict(storm.did)}; {len(storm.clients)} requests {dict(ends)} {dict(said)}")
