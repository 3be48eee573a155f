"""Many streams at once over three unequal workers: each equals its solo run, and nothing is left behind."""

import asyncio
import random
from dataclasses import replace
from pathlib import Path

import pytest

from helixd.coordinator.generation import Refused
from helixd.coordinator.planning import ModelSizes, PlanningOptions
from helixd.engine.engine import PAGE_TOKENS
from helixd.model.config import load_config
from helixd.plan.cluster.spec import WorkloadSpec
from helixd.sampling import SamplingParams
from tests.cluster import GREEDY, Cluster, Outcome, cluster, take
from tests.families import exact_checkpoint, make_checkpoint, reference

SHORT = ([3, 17, 5, 40, 8, 22, 9], [11, 2, 33, 7, 28])
UNEQUAL = {"a": (0, 3), "b": (2, 5), "c": (5, 6)}
ROOM = 64 << 20


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("streams") / "m"
    exact_checkpoint("llama2", path, SHORT, 24)
    return path


@pytest.fixture(scope="module")
def long_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("streams") / "long"
    make_checkpoint("llama2", path, 5)
    return path


async def cancelled_half_way(made: Cluster, prompt: list[int], after: int) -> None:
    generation = await made.coordinator.submit(made.request(prompt, 400))
    outcome = Outcome()
    async for event in generation.events():
        take(outcome, event)
        if 0 in outcome.choices and len(outcome.choices[0].tokens) >= after:
            break
    await generation.cancel()


async def test_64_streams_of_mixed_lengths_equal_their_solo_runs(long_checkpoint: Path) -> None:
    draw = random.Random(7)
    lengths = [4, 1500, 700, *(draw.choice((4, 9, 33, 64, 130, 257)) for _ in range(45))]
    asked = []
    for number, length in enumerate(lengths):
        prompt = [draw.randrange(1, 200) for _ in range(length)]
        sampling = GREEDY if number % 2 else SamplingParams(seed=number, temperature=1.0, top_p=0.95)
        asked.append((prompt, 16 if length > 300 else 24, sampling))
    async with cluster(long_checkpoint, {"a": ROOM, "b": ROOM, "c": ROOM}, carrier="sockets") as made:
        await made.serve(UNEQUAL)
        leaving = [cancelled_half_way(made, [draw.randrange(1, 200) for _ in range(20)], 1 + n) for n in range(16)]
        outcomes, _ = await asyncio.gather(
            asyncio.gather(*(made.ask(prompt, new, sampling=sampling) for prompt, new, sampling in asked)),
            asyncio.gather(*leaving),
        )
        await made.settled()
        for (prompt, new, sampling), outcome in list(zip(asked, outcomes, strict=True))[::6]:
            alone = await made.ask(prompt, new, sampling=sampling)
            assert alone.tokens == outcome.tokens
        assert all(len(outcome.tokens) == new for (_, new, _), outcome in zip(asked, outcomes, strict=True))
        await made.settled()


async def test_little_kv_preempts_and_everybody_still_finishes_exactly(checkpoint: Path) -> None:
    """KV for four sequences of a page each; eight requests that grow to two pages: preempted ones go on, exactly."""
    sizes = ModelSizes.of(load_config(checkpoint), "float32")
    budgets = {
        name: sizes.weights_of(range(*held)) + 4 * PAGE_TOKENS * (held[1] - held[0]) * sizes.kv_bytes_per_token_layer
        for name, held in UNEQUAL.items()
    }
    planning = PlanningOptions(workload=WorkloadSpec(mean_output_tokens=4.0))
    async with cluster(checkpoint, budgets, planning=planning) as made:
        await made.serve(UNEQUAL)
        outcomes = await asyncio.gather(*(made.ask(SHORT[n % 2], 100) for n in range(8)))
        alone = [await made.ask(prompt, 100) for prompt in SHORT]
        for number, outcome in enumerate(outcomes):
            assert outcome.tokens == alone[number % 2].tokens
        assert sum(outcome.retries for outcome in outcomes) > 0
        await made.settled()


async def test_a_request_beyond_the_queue_is_refused_whole_and_leaves_nothing(checkpoint: Path) -> None:
    """KV for four sequences, of which some is kept free, and a queue of one: four choices get in, eight do not."""
    sizes = ModelSizes.of(load_config(checkpoint), "float32")
    room = sizes.weights_of(range(6)) + 4 * PAGE_TOKENS * 6 * sizes.kv_bytes_per_token_layer
    async with cluster(checkpoint, {"a": room}, queue=1) as made:
        await made.serve({"a": (0, 6)})
        with pytest.raises(Refused) as refused:
            await made.ask(SHORT[0], 20, n=8)
        assert (refused.value.status, refused.value.code) == (429, "rate_limit_exceeded")
        await made.settled()
        outcome = await made.ask(SHORT[0], 20, n=4)
        assert outcome.failed is None
        assert len(outcome.choices) == 4
        await made.settled()


@pytest.mark.parametrize("max_tokens", [None, 500])
async def test_a_sequence_ends_where_the_clusters_kv_does(checkpoint: Path, max_tokens: int | None) -> None:
    sizes = ModelSizes.of(load_config(checkpoint), "float32")
    room = sizes.weights_of(range(6)) + int(1.5 * PAGE_TOKENS) * 6 * sizes.kv_bytes_per_token_layer
    async with cluster(checkpoint, {"a": room}) as made:
        await made.serve({"a": (0, 6)})
        outcome = await made.ask(SHORT[0], max_tokens)
        assert outcome.choices[0].reason == "length"
        assert len(SHORT[0]) + len(outcome.tokens) == PAGE_TOKENS
        assert outcome.retries == 0
        with pytest.raises(Refused, match="KV cache"):
            await made.ask([1] * PAGE_TOKENS, 1)
        await made.settled()


async def test_choices_stop_strings_and_seeds(checkpoint: Path) -> None:
    async with cluster(checkpoint, {"a": ROOM, "b": ROOM, "c": ROOM}) as made:
        await made.serve(UNEQUAL)
        sampling = SamplingParams(seed=3, temperature=1.0)
        both = await made.ask(SHORT[0], 12, n=2, sampling=sampling)
        again = await made.ask(SHORT[0], 12, n=2, sampling=sampling)
        assert both.choices[0].tokens == again.choices[0].tokens
        assert both.choices[1].tokens == again.choices[1].tokens
        assert both.choices[0].tokens != both.choices[1].tokens
        tokens = list(reference(checkpoint, tuple(SHORT[0]), 24).tokens)
        stopped = await made.ask(SHORT[0], 24, stop=(f"<{tokens[5]}>",))
        first = tokens.index(tokens[5])
        assert stopped.choices[0].text == "".join(f"<{token}>" for token in tokens[:first])
        assert stopped.choices[0].reason == "stop"
        assert (await made.ask(SHORT[0], 24, stop_token_ids=(tokens[5],))).choices[0].reason == "stop"
        await made.settled()


async def test_the_prompt_is_scored_as_the_reference_scores_it(checkpoint: Path) -> None:
    prompt = [*SHORT[0], *SHORT[1]]
    async with cluster(checkpoint, {"a": ROOM, "b": ROOM, "c": ROOM}) as made:
        await made.serve(UNEQUAL)
        scored = await made.ask(prompt, 0, prompt_logprobs=True, sampling=replace(GREEDY, logprobs=1))
        assert scored.scored is not None
        assert scored.scored.logprobs[0] is None
        assert len(scored.scored.logprobs) == len(prompt)
        for at in range(1, len(prompt)):
            wanted = reference(checkpoint, tuple(prompt[:at]), 1).logits.log_softmax(-1)[0, prompt[at]]
            given = scored.scored.logprobs[at]
            assert given is not None
            assert given.logprob == pytest.approx(float(wanted), abs=1e-4)
        await made.settled()


async def test_a_killed_worker_is_replaced_by_its_replica(checkpoint: Path) -> None:
    ranges = {"a1": (0, 2), "a2": (0, 2), "b1": (2, 6), "b2": (2, 6)}
    async with cluster(checkpoint, dict.fromkeys(ranges, ROOM)) as made:
        await made.serve(ranges)
        asked = [asyncio.ensure_future(made.ask(SHORT[n % 2], 24)) for n in range(8)]
        await asyncio.sleep(0.05)
        await made.kill(next(unit for unit in made.units if unit.name == "b1"))
        outcomes = await asyncio.gather(*asked)
        for number, outcome in enumerate(outcomes):
            assert outcome.tokens == list(reference(checkpoint, tuple(SHORT[number % 2]), 24).tokens)
        assert any(outcome.retries for outcome in outcomes)
        await made.settled()


async def test_a_worker_that_comes_and_goes_leaves_no_task_behind(checkpoint: Path) -> None:
    def senders() -> list[str]:
        return sorted(name for task in asyncio.all_tasks() if (name := task.get_name()).startswith("send to"))

    async with cluster(checkpoint, {"a": ROOM, "b": ROOM}) as made:
        await made.serve({"a": (0, 3), "b": (3, 6)})
        before = senders()
        for life in (2, 3):
            await made.kill(made.units[-1])
            await made.add_worker("b", ROOM, incarnation=life)
            await made.joined(2)
            async with asyncio.timeout(20):
                while made.coordinator.epochs.unready_nodes():
                    await asyncio.sleep(0.01)
        assert senders() == before


async def test_a_new_plan_moves_running_sequences_without_a_seam(checkpoint: Path) -> None:
    async with cluster(checkpoint, {"a": ROOM, "b": ROOM, "c": ROOM}) as made:
        await made.serve({"a": (0, 2), "b": (2, 4), "c": (4, 6)})
        asked = [asyncio.ensure_future(made.ask(SHORT[n % 2], 24)) for n in range(4)]
        await asyncio.sleep(0.03)
        await made.serve({"c": (0, 2), "a": (2, 4), "b": (4, 6)})
        outcomes = await asyncio.gather(*asked)
        for number, outcome in enumerate(outcomes):
            assert outcome.tokens == list(reference(checkpoint, tuple(SHORT[number % 2]), 24).tokens)
        await made.settled()


async def test_without_a_worker_a_request_ends_with_a_named_error(checkpoint: Path) -> None:
    ranges = {"a": (0, 3), "b": (3, 6)}
    async with cluster(checkpoint, dict.fromkeys(ranges, ROOM), failover_wait_s=0.3) as made:
        await made.serve(ranges)
        asked = asyncio.ensure_future(made.ask(SHORT[0], 400))
        async with asyncio.timeout(20):
            while not any(host.engine.kv_pages_used for host in made.units[1].worker.hosts.values()):
                await asyncio.sleep(0)
        await made.kill(made.units[1])
        outcome = await asked
        assert outcome.failed is not None
        assert outcome.failed.code == "pipeline_lost"
        assert made.coordinator.admission.running == made.coordinator.admission.waiting == 0
