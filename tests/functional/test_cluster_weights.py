"""Who holds other weights is refused before a token; who holds the same ones, or speaks the version before, is not."""

import asyncio
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from helixd.coordinator.replanning import ReplanOptions
from helixd.model.index import SafetensorsIndex
from helixd.protocol import versions
from helixd.worker import worker as worker_module
from tests.cluster import cluster, make_plan
from tests.families import make_checkpoint, reference

BUDGET = 64 << 20
TENSOR = "model.layers.3.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "llama2"
    make_checkpoint("llama2", path, 1)
    return path


def other_tensor(path: Path) -> None:
    tensors = load_file(path / "model.safetensors")
    tensors[TENSOR][1, 2] += 0.5
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def other_dtype(path: Path) -> None:
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(path / "model.safetensors").items()}
    save_file(tensors, path / "model.safetensors")


def other_tokenizer(path: Path) -> None:
    (path / "tokenizer.json").write_text("{}")


def other_config(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))


@pytest.mark.parametrize(
    ("change", "code", "says"),
    [
        (other_tensor, "weights", TENSOR),
        (other_dtype, "fingerprint", "fingerprint"),
        (other_tokenizer, "fingerprint", "fingerprint"),
        (other_config, "fingerprint", "fingerprint"),
    ],
)
async def test_other_weights_are_refused_at_the_door(
    checkpoint: Path, tmp_path: Path, change: Callable[[Path], None], code: str, says: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    change(copy)
    async with cluster(checkpoint, {}) as made:
        unit = await made.add_worker("w", BUDGET, copy=copy)
        async with asyncio.timeout(30):
            await asyncio.wait({unit.task})
        (error,) = made.refusals
        assert f"({code})" in error
        assert says in error
        assert not made.coordinator.fleet.nodes


async def test_the_same_weights_join_and_serve(checkpoint: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    async with cluster(checkpoint, {}) as made:
        await made.add_worker("w", BUDGET, copy=copy)
        await made.joined(1)
        await made.serve({"w": (0, made.model.config.num_layers)})
        assert len((await made.ask([1, 2, 3], 4)).tokens) == 4


def flip(file: Path, offset: int) -> None:
    with file.open("r+b") as opened:
        opened.seek(offset)
        opened.write(b"\x55" * 4)


def cut(file: Path, offset: int) -> None:
    os.truncate(file, offset + 1)


@pytest.mark.parametrize(("damage", "says"), [(flip, f"tensor {TENSOR} is damaged"), (cut, "ends early")])
async def test_damage_after_joining_is_not_loaded(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path, int], None], says: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    async with cluster(checkpoint, {}) as made:
        await made.add_worker("w", BUDGET, copy=copy)
        await made.joined(1)
        ref = made.model.index.ref(TENSOR) if made.model.index is not None else None
        assert ref is not None
        damage(copy / ref.file, ref.offset)
        layers = made.model.config.num_layers
        made.coordinator.epochs.push(make_plan(layers, {"w": (0, layers)}))
        async with asyncio.timeout(30):
            while not (failed := [record for record in caplog.records if record.msg == "node_failed"]):
                await asyncio.sleep(0.01)
        assert says in str(vars(failed[0]))
        assert "tensor" in str(vars(failed[0]))
        assert not made.coordinator.readiness().ready


async def test_a_cache_that_is_damaged_is_named_and_fetched_again(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = ReplanOptions(wait_for_nodes=1, settle_s=0.05, cooldown_s=0.0, retry_failed_s=0.3)
    for damaged in (False, True):
        if damaged:
            spoil(tmp_path, "layer-0003", TENSOR)
        async with cluster(checkpoint, {}, replan=options) as made:
            await made.add_worker("w", BUDGET, cache=tmp_path)
            await made.ready()
            assert (await made.ask([1, 2, 3], 4)).tokens == list(reference(checkpoint, (1, 2, 3), 4).tokens)
        said = [str(vars(record)) for record in caplog.records if record.msg == "node_failed"]
        assert bool(said) == damaged
        assert all(f"tensor {TENSOR} is damaged in the cache" in text for text in said)


def spoil(cache: Path, group: str, tensor: str) -> None:
    [file] = cache.rglob(f"{group}/model.safetensors")
    with SafetensorsIndex.open(file.parent) as index, file.open("r+b") as opened:
        opened.seek(index.ref(tensor).offset)
        opened.write(b"\x55" * 4)


async def test_a_cache_of_other_weights_with_the_same_names_is_not_used(checkpoint: Path, tmp_path: Path) -> None:
    """The operator put a tuned model in the place of the first one."""
    first, tuned, cache = tmp_path / "m1", tmp_path / "m2", tmp_path / "cache"
    shutil.copytree(checkpoint, first)
    make_checkpoint("llama2", tuned, 2)
    for path in (first, tuned):
        async with cluster(path, {}) as made:
            await made.add_worker("w", BUDGET, cache=cache)
            await made.joined(1)
            await made.serve({"w": (0, made.model.config.num_layers)})
            wanted = reference(path, (1, 2, 3), 4).tokens
            assert (await made.ask([1, 2, 3], 4)).tokens == list(wanted)


@pytest.mark.parametrize(("ours", "oldest"), [(1, 1), (1, 0), (3, 2), (3, 1)])
async def test_a_worker_one_version_away_joins(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, ours: int, oldest: int
) -> None:
    monkeypatch.setattr(worker_module, "PROTOCOL_VERSION", ours)
    monkeypatch.setattr(worker_module, "OLDEST_VERSION", oldest)
    async with cluster(checkpoint, {"w": BUDGET}) as made:
        await made.serve({"w": (0, made.model.config.num_layers)})
        assert len((await made.ask([1, 2, 3], 4)).tokens) == 4


@pytest.mark.parametrize(
    ("ours", "oldest", "advice"), [(0, 0, "upgrade the worker"), (4, 3, "upgrade the coordinator")]
)
async def test_a_worker_two_versions_away_is_refused_with_advice(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, ours: int, oldest: int, advice: str
) -> None:
    monkeypatch.setattr(worker_module, "PROTOCOL_VERSION", ours)
    monkeypatch.setattr(worker_module, "OLDEST_VERSION", oldest)
    async with cluster(checkpoint, {}) as made:
        unit = await made.add_worker("w", BUDGET)
        async with asyncio.timeout(30):
            await asyncio.wait({unit.task})
        (error,) = made.refusals
        assert advice in error


async def test_a_worker_meets_a_coordinator_of_the_version_before(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The coordinator then speaks version 1 only; the worker, of version 2, goes along."""
    monkeypatch.setattr(versions, "PROTOCOL_VERSION", 1)
    async with cluster(checkpoint, {"w": BUDGET}) as made:
        await made.serve({"w": (0, made.model.config.num_layers)})
        assert len((await made.ask([1, 2, 3], 4)).tokens) == 4


def test_versions_agree_on_the_newest_of_both() -> None:
    both = range(versions.OLDEST_VERSION, versions.PROTOCOL_VERSION + 1)
    assert [versions.common_version(version, version) for version in both] == list(both)
    assert (
        versions.common_version(versions.PROTOCOL_VERSION + 1, versions.PROTOCOL_VERSION) == versions.PROTOCOL_VERSION
    )
    assert versions.common_version(versions.PROTOCOL_VERSION + 1, versions.PROTOCOL_VERSION + 1) is None
    assert versions.common_version(versions.OLDEST_VERSION - 1, 0) is None
