"""Two workers that only reach the coordinator, over real sockets: it carries their rows, and the tokens are exact."""

import asyncio
from pathlib import Path

import pytest

from helixd.coordinator import relay
from helixd.coordinator.figures import CoordinatorFigures
from helixd.coordinator.planning import ModelSizes
from helixd.errors import PeerLost
from helixd.ids import PeerId
from helixd.model.config import load_config
from helixd.protocol.messages import LinkLost
from helixd.wire.endpoint import Endpoint
from helixd.wire.link import Link
from tests.cluster import Carrier, cluster
from tests.families import exact_checkpoint, reference

PROMPTS = ([3, 17, 5, 40, 8, 22, 9], [11, 2, 33, 7, 28] * 30)
NEW = 12


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("relay") / "m"
    exact_checkpoint("llama2", path, PROMPTS, NEW)
    return path


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Workers reach the coordinator only, until this is emptied."""
    names = {"a", "b"}
    dial = Endpoint.dial

    async def guarded(self: Endpoint, host: str, port: int, timeout_s: float, expect: PeerId | None = None) -> Link:
        if self.identity.peer in names and expect in names:
            raise PeerLost(str(expect), "cannot connect: no route to host")
        return await dial(self, host, port, timeout_s, expect)

    monkeypatch.setattr(Endpoint, "dial", guarded)
    return names


@pytest.mark.parametrize("small_bytes", [relay.SMALL_BYTES, 100])
async def test_rows_go_by_the_coordinator_and_come_back_exact(
    checkpoint: Path, apart: set[str], monkeypatch: pytest.MonkeyPatch, small_bytes: int
) -> None:
    monkeypatch.setattr(relay, "SMALL_BYTES", small_bytes)
    sizes = ModelSizes.of(load_config(checkpoint), "float32")
    # No worker could hold it all.
    most = sizes.weights_of((0, 1, 2, 5)) + 256 * 4 * sizes.kv_bytes_per_token_layer
    carrier: Carrier = "sockets"
    async with cluster(checkpoint, {"a": most, "b": most}, carrier=carrier, planned=True) as made:
        active = made.coordinator.epochs.active
        assert active is not None
        assert active.relayed == {frozenset(("a", "b"))}
        answers = await asyncio.gather(*(made.ask(PROMPTS[n % 2], NEW) for n in range(6)))
        for n, answer in enumerate(answers):
            assert answer.tokens == list(reference(checkpoint, tuple(PROMPTS[n % 2]), NEW).tokens)
            assert answer.retries == 0
        assert all(set(unit.endpoint.links) == {"hub"} for unit in made.units)
        figures = {
            sample.name: sample.value
            for each in CoordinatorFigures(made.coordinator).collect()
            for sample in each.samples
        }
        assert figures["helixd_relayed_pairs"] == 1
        assert figures["helixd_relayed_bytes_total"] > 0
        assert figures["helixd_relay_dropped_frames_total"] == 0
        await made.settled()


async def test_a_dial_given_up_late_breaks_nothing_that_is_relayed_already(checkpoint: Path, apart: set[str]) -> None:
    sizes = ModelSizes.of(load_config(checkpoint), "float32")
    most = sizes.weights_of((0, 1, 2, 5)) + 256 * 4 * sizes.kv_bytes_per_token_layer
    async with cluster(checkpoint, {"a": most, "b": most}, carrier="sockets", planned=True) as made:
        asked = [asyncio.ensure_future(made.ask(PROMPTS[0], NEW)) for _ in range(6)]
        async with asyncio.timeout(20):
            while made.coordinator.admission.running < len(asked):
                await asyncio.sleep(0)
        for unit, other in zip(made.units, ("b", "a"), strict=True):
            assert unit.worker._session is not None
            unit.worker._session._post.to_coordinator(LinkLost(other, "no link within 5.0 s"))
        for answer in await asyncio.gather(*asked):
            assert answer.tokens == list(reference(checkpoint, tuple(PROMPTS[0]), NEW).tokens)
            assert answer.retries == 0
        await made.settled()
