"""Plans come and go while requests run: nothing breaks for it, nothing is held that the plan in force does not need."""

import asyncio
from pathlib import Path

import pytest

from helixd.coordinator.planning import ModelSizes
from helixd.coordinator.replanning import ReplanOptions
from helixd.errors import ModelError
from helixd.ids import Epoch, PeerId
from helixd.layers import LayerRange
from helixd.model.config import load_config
from helixd.model.index import SafetensorsIndex
from helixd.wire.memory_link import LinkConditions
from tests.cluster import Carrier, Cluster, cluster
from tests.families import exact_checkpoint, reference

PROMPTS = ([3, 17, 5, 40, 8, 22, 9], [11, 2, 33, 7, 28])
NEW = 24
PLANS: tuple[dict[str, tuple[int, int]], ...] = (
    {"a": (0, 2), "b": (2, 4), "c": (4, 6)},
    {"c": (0, 2), "a": (2, 4), "b": (4, 6)},
    {"b": (0, 2), "c": (2, 4), "a": (4, 6)},
)
ROOM = 64 << 20


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("epochs") / "m"
    exact_checkpoint("llama2", path, PROMPTS, NEW)
    return path


async def exact(made: Cluster, path: Path, number: int) -> int:
    """Ask and compare; how many routes broke."""
    prompt = PROMPTS[number % 2]
    outcome = await made.ask(prompt, NEW)
    assert outcome.tokens == list(reference(path, tuple(prompt), NEW).tokens)
    return outcome.retries


@pytest.mark.parametrize("carrier", ["memory", "sockets"])
async def test_the_first_request_of_a_plan_finds_its_links_up(checkpoint: Path, carrier: Carrier) -> None:
    for plan in PLANS:
        async with cluster(checkpoint, dict.fromkeys("abc", ROOM), carrier=carrier) as made:
            await made.serve(plan)
            assert await exact(made, checkpoint, 0) == 0
            await made.settled()


async def test_a_plan_serves_once_its_links_are_up_however_long_they_take(checkpoint: Path) -> None:
    """Workers far from each other and near to the coordinator."""
    async with cluster(checkpoint, dict.fromkeys("abc", ROOM)) as made:
        for unit in made.units:
            for link in [link for peer, link in unit.endpoint.links.items() if peer != "hub"]:
                await link.close("what was dialled for probes is gone")
        for one, other in (("a", "b"), ("b", "c"), ("a", "c")):
            made.network.set_conditions(PeerId(one), PeerId(other), LinkConditions(latency_s=0.03))
        await made.serve(PLANS[0])
        assert await exact(made, checkpoint, 0) == 0
        await made.settled()


async def test_streams_go_on_through_plan_after_plan(checkpoint: Path) -> None:
    async with cluster(checkpoint, dict.fromkeys("abc", ROOM)) as made:
        await made.serve(PLANS[0])
        over = asyncio.Event()

        async def keeps_asking(number: int) -> int:
            asked = 0
            while not over.is_set():
                await exact(made, checkpoint, number)
                asked += 1
            return asked

        async with asyncio.TaskGroup() as clients:
            asking = [clients.create_task(keeps_asking(n)) for n in range(4)]
            for plan in (*PLANS[1:], *PLANS):
                await made.serve(plan)
                await asyncio.sleep(0.05)
            over.set()
        assert all(task.result() > 0 for task in asking)
        await made.settled()
        for unit in made.units:
            host = unit.worker.hosts[unit.node]
            assert host.held() == [PLANS[2][unit.name]]


async def test_plans_that_do_not_fit_side_by_side_pause_and_go_on(checkpoint: Path) -> None:
    """Each worker has memory for its own layers and the KV of a few sequences, not for two plans' layers."""
    sizes = ModelSizes.of(load_config(checkpoint), "float32")
    room = max(sizes.weights_of((0, 1)), sizes.weights_of((4, 5))) + 2 * 1024 * sizes.kv_bytes_per_token_layer
    async with cluster(checkpoint, dict.fromkeys("abc", room)) as made:
        await made.serve(PLANS[0])
        for plan in (*PLANS[1:], *PLANS):
            asked = [asyncio.ensure_future(exact(made, checkpoint, n)) for n in range(4)]
            await asyncio.sleep(0.02)
            await made.serve(plan)
            await asyncio.gather(*asked)
        await made.settled()
        for unit in made.units:
            host = unit.worker.hosts[unit.node]
            assert host.held() == [PLANS[2][unit.name]]
            assert host.engine.kv_capacity_token_layers > 0


async def test_a_load_that_is_late_for_its_own_epoch_holds_nothing(checkpoint: Path) -> None:
    async with cluster(checkpoint, {"a": ROOM}) as made:
        await made.serve({"a": (0, 6)})
        (unit,) = made.units
        host = unit.worker.hosts[unit.node]
        source = SafetensorsIndex.open(checkpoint)
        await host.load(Epoch(5), LayerRange(4, 6), 1024, source, lambda done, total: None)
        await host.retire_below(Epoch(5))
        await host.load(Epoch(4), LayerRange(0, 2), 1024, source, lambda done, total: None)
        assert host.held() == [(4, 6)]
        host.forget_epochs()
        await host.load(Epoch(1), LayerRange(0, 2), 1024, source, lambda done, total: None)
        assert host.held() == [(0, 2)], "another coordinator counts its own epochs"


async def test_a_node_that_cannot_load_is_planned_around_and_tried_again_later(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It could hold the whole model, the others a half each."""
    sizes = ModelSizes.of(load_config(checkpoint), "float32")
    half = sizes.weights_of((0, 1, 5)) + 256 * 4 * sizes.kv_bytes_per_token_layer
    options = ReplanOptions(wait_for_nodes=2, settle_s=0.05, cooldown_s=0.0, retry_failed_s=4.0)
    async with cluster(checkpoint, {"bad": ROOM}, replan=options) as made:
        coordinator = made.coordinator
        (unit,) = made.units
        broken = True
        load = unit.worker.hosts[unit.node].load

        async def fails(*arguments: object) -> None:
            if broken:
                raise ModelError("tensor model.layers.1.mlp.up_proj.weight is truncated")
            await load(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(unit.worker.hosts[unit.node], "load", fails)
        await made.add_worker("one", half)
        async with asyncio.timeout(30):
            while not coordinator.fleet.nodes[unit.node].problem:
                await asyncio.sleep(0.01)
        assert not coordinator.readiness().ready
        await made.add_worker("two", half)
        await made.ready()
        assert coordinator.epochs.active is not None
        assert set(coordinator.epochs.active.plan.placement) == {"one", "two"}
        await exact(made, checkpoint, 0)
        broken = False
        async with asyncio.timeout(30):
            while coordinator.fleet.nodes[unit.node].problem or coordinator.epochs.unready_nodes():
                await asyncio.sleep(0.05)
        await exact(made, checkpoint, 1)
        await made.settled()
