"""Three workers give the tokens that `transformers` gives, for every split of the layers, in every family."""

import asyncio
import math
from itertools import combinations
from pathlib import Path

import pytest
import torch

from helixd.ids import Attempt, NodeId, SequenceId
from helixd.layers import LayerRange
from helixd.model.config import load_config
from helixd.route.router import Route, RouteHop, Router
from helixd.sampling import SamplingParams
from tests.cluster import Cluster, cluster, make_plan
from tests.families import FAMILIES, exact_checkpoint, reference

PROMPTS = ([3, 17, 5, 40, 8, 22, 9], [11, 2, 33, 7, 28, 19, 4, 6, 31, 12, 45, 27, 1, 38])
NEW = 64
BUDGET = 64 << 20
ROOM = 1 << 20
FIRST = Attempt(0)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {}


def checkpoint(family: str, known: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    if family not in known:
        path = tmp_path_factory.mktemp("exact") / family
        exact_checkpoint(family, path, PROMPTS, NEW)
        known[family] = path
    return known[family]


def splits(layers: int) -> list[dict[str, tuple[int, int]]]:
    """Every way three workers share `layers` in a chain a -> b -> c; where ranges overlap, b or c is entered late."""
    found = []
    for end_a, end_b in combinations(range(1, layers), 2):
        for start_b in range(end_a + 1):
            for start_c in range(end_b + 1):
                late_b, late_c = start_b < end_a, start_c < end_b
                # Deeper overlaps differ only in layers that are held and not used: one of each kind says it all.
                if (late_b and start_b != end_a - 1) or (late_c and start_c != end_b - 1):
                    continue
                found.append({"a": (0, end_a), "b": (start_b, end_b), "c": (start_c, layers)})
    return found


async def check(made: Cluster, path: Path, prompt: list[int]) -> None:
    """Tokens and log probabilities of one prompt."""
    sampling = SamplingParams(seed=0, temperature=0.0, logprobs=2)
    outcome = await made.ask(prompt, NEW, sampling=sampling)
    wanted = reference(path, tuple(prompt), NEW)
    assert outcome.tokens == list(wanted.tokens), outcome.route
    logprobs = torch.log_softmax(wanted.logits, -1)
    for at, given in enumerate(outcome.choices[0].logprobs):
        assert given is not None
        assert math.isclose(given.logprob, float(logprobs[at, wanted.tokens[at]]), abs_tol=1e-4)


class EveryRoute(Router):
    """Draws each of the given routes in turn, over nodes that hold everything."""

    def __init__(self, made: Cluster, routes: list[dict[str, tuple[int, int]]]) -> None:
        super().__init__(
            make_plan(made.model.config.num_layers, dict.fromkeys("abc", (0, made.model.config.num_layers))),
            {NodeId(name): ROOM for name in "abc"}, ledger=made.coordinator.admission.ledger,
        )  # fmt: skip
        self._routes = iter(routes)

    def draw(self, sequence: SequenceId, *_: object, attempt: Attempt = FIRST, **__: object) -> Route:
        hops, entry = [], 0
        for name, (_, end) in next(self._routes).items():
            hops.append(RouteHop(NodeId(name), LayerRange(entry, end)))
            entry = end
        for hop in hops:
            self.ledger.reserve(sequence, hop.node, len(hop.layers), 128, attempt=attempt)
        return Route(tuple(hops))


@pytest.mark.parametrize("family", FAMILIES)
async def test_every_split_at_once(
    family: str, checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Three workers hold every layer; one sequence for each way to cut them runs with all the others in one batch."""
    path = checkpoint(family, checkpoints, tmp_path_factory)
    layers = load_config(path).num_layers
    cuts = [{"a": (0, one), "b": (one, two), "c": (two, layers)} for one, two in combinations(range(1, layers), 2)]
    async with cluster(path, {"a": BUDGET, "b": BUDGET, "c": BUDGET}) as made:
        await made.serve(dict.fromkeys("abc", (0, layers)), mesh=True)
        active = made.coordinator.epochs.active
        assert active is not None
        made.coordinator.admission.use_plan(active.epoch, EveryRoute(made, cuts))
        await asyncio.gather(*(check(made, path, PROMPTS[at % 2]) for at in range(len(cuts))))
        await made.settled()


@pytest.mark.parametrize("family", FAMILIES)
async def test_overlapping_ranges_in_memory(
    family: str, checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Plans with ranges that overlap: a sequence enters the later range in its middle."""
    path = checkpoint(family, checkpoints, tmp_path_factory)
    layers = load_config(path).num_layers
    overlapping = [
        ranges for ranges in splits(layers) if ranges["b"][0] < ranges["a"][1] and ranges["c"][0] < ranges["b"][1]
    ]
    async with cluster(path, {"a": BUDGET, "b": BUDGET, "c": BUDGET}) as made:
        for ranges in overlapping if family == FAMILIES[0] else overlapping[::5]:
            await made.serve(ranges)
            await asyncio.gather(*(check(made, path, prompt) for prompt in PROMPTS))
        await made.settled()


@pytest.mark.parametrize("family", FAMILIES)
async def test_three_splits_over_sockets(
    family: str, checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = checkpoint(family, checkpoints, tmp_path_factory)
    layers = load_config(path).num_layers
    async with cluster(path, {"a": BUDGET, "b": BUDGET, "c": BUDGET}, carrier="sockets") as made:
        for ranges in (
            {"a": (0, 1), "b": (1, 2), "c": (2, layers)},
            {"a": (0, layers - 2), "b": (layers - 2, layers - 1), "c": (layers - 1, layers)},
            {"a": (0, 2), "b": (1, 3), "c": (1, layers)},
        ):
            await made.serve(ranges)
            await check(made, path, PROMPTS[0])
        await made.settled()
