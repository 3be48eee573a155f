"""Two worker processes whose peer ports nobody reaches: the coordinator carries their rows, and says so."""

import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.daemons import Daemons, add_tokenizer, byte_tokenizer, completion, daemons
from tests.families import VOCAB, exact_checkpoint, reference_tokens

pytestmark = pytest.mark.chaos

PROMPT = [3, 17, 5, 40, 8, 22, 9]
NEW = 24
NOBODY = "127.0.0.1:9"
"""The discard port: nothing listens there."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("relay") / "m"
    exact_checkpoint("llama2", path, (PROMPT,), NEW)
    add_tokenizer(path)
    return path


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Daemons]:
    with daemons(tmp_path) as made:
        yield made


def test_processes_that_only_reach_the_coordinator_serve_exactly(made: Daemons, checkpoint: Path) -> None:
    made.pinned_cluster(checkpoint, {"a": (0, 3), "b": (3, 6)}, worker=("--set", f"cluster.advertise={NOBODY}"))
    made.wait_ready()
    stream = completion(made, PROMPT, NEW).read()
    assert stream.done
    assert stream.text == byte_tokenizer(VOCAB).decode(reference_tokens(checkpoint, tuple(PROMPT), NEW))
    view = made.get("/cluster")
    assert view["plan"]["relayed"] == [["a", "b"]]
    assert view["relay"]["carried_frames"] > 0
    assert view["relay"]["dropped_frames"] == 0
    with urllib.request.urlopen(f"http://{made.api}/metrics", timeout=10) as answer:
        assert b"\nhelixd_relayed_pairs 1.0\n" in answer.read()
    made.wait_idle()
