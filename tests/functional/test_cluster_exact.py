"""Three workers give the tokens that `transformers` gives, for every split of the layers, in every family."""

import asyncio
import math
from itertools import combinations
from pathlib import Path

import pytest
import torch

from helixd.model.config import load_config
from helixd.sampling import SamplingParams
from tests.cluster import Cluster, cluster
from tests.families import FAMILIES, exact_checkpoint, reference

PROMPTS = ([3, 17, 5, 40, 8, 22, 9], [11, 2, 33, 7, 28, 19, 4, 6, 31, 12, 45, 27, 1, 38])
NEW = 64
BUDGET = 64 << 20


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


async def check(made: Cluster, path: Path) -> None:
    """Both prompts together, tokens and log probabilities."""
    outcomes = await asyncio.gather(
        *(made.ask(prompt, NEW, sampling=SamplingParams(seed=0, temperature=0.0, logprobs=2)) for prompt in PROMPTS)
    )
    for prompt, outcome in zip(PROMPTS, outcomes, strict=True):
        wanted = reference(path, tuple(prompt), NEW)
        assert outcome.tokens == list(wanted.tokens)
        logprobs = torch.log_softmax(wanted.logits, -1)
        for at, given in enumerate(outcome.choices[0].logprobs):
            assert given is not None
            assert math.isclose(given.logprob, float(logprobs[at, wanted.tokens[at]]), abs_tol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
async def test_every_split_in_memory(
    family: str, checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = checkpoint(family, checkpoints, tmp_path_factory)
    layers = load_config(path).num_layers
    async with cluster(path, {"a": BUDGET, "b": BUDGET, "c": BUDGET}) as made:
        for ranges in splits(layers):
            await made.serve(ranges)
            await check(made, path)
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
            await check(made, path)
        await made.settled()
