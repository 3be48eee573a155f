"""Digests of weights: what differs is named, what is known is remembered until a file changes, damage is noticed."""

import errno
import os
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from helixd.errors import ModelError
from helixd.model.digests import DIGEST_BYTES, VerifiedSource, tensor_digest, weight_digests
from helixd.model.index import SafetensorsIndex

NAMES = ("a", "model.layers.0.mlp.down_proj.weight", "z")


def checkpoint(path: Path, **changed: float) -> Path:
    path.mkdir(exist_ok=True)
    save_file({name: torch.full((4, 8), changed.get(name[0], 1.0)) for name in NAMES}, path / "new")
    (path / "new").replace(path / "model.safetensors")
    return path


def flip(path: Path, at: int) -> None:
    """One bit, with the file's times left as they are: what a failing disk does."""
    file = path / "model.safetensors"
    before = file.stat()
    with file.open("r+b") as opened:
        opened.seek(at)
        (byte,) = opened.read(1)
        opened.seek(at)
        opened.write(bytes([byte ^ 1]))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_equal_weights_have_equal_digests_and_others_are_named(tmp_path: Path) -> None:
    with (
        SafetensorsIndex.open(checkpoint(tmp_path / "one")) as one,
        SafetensorsIndex.open(checkpoint(tmp_path / "two")) as two,
        SafetensorsIndex.open(checkpoint(tmp_path / "other", m=2.0)) as other,
        SafetensorsIndex.open(checkpoint(tmp_path / "both", m=2.0, z=3.0)) as both,
    ):
        ours = weight_digests(one, None)
        assert ours.difference(weight_digests(two, None).packed()) is None
        wrong = ours.difference(weight_digests(other, None).packed())
        assert wrong is not None
        assert NAMES[1] in wrong
        assert "more" not in wrong
        assert "1 more" in (ours.difference(weight_digests(both, None).packed()) or "")
        assert ours.by_tensor["a"] == tensor_digest(one.read("a").data)


@pytest.mark.parametrize("packed", [b"", b"x", bytes(DIGEST_BYTES), bytes(DIGEST_BYTES * 4)])
def test_digests_of_another_count_differ(tmp_path: Path, packed: bytes) -> None:
    with SafetensorsIndex.open(checkpoint(tmp_path)) as index:
        assert weight_digests(index, None).difference(packed)


def test_they_are_remembered_until_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, reads = tmp_path / "digests.json", []
    stored = SafetensorsIndex.read_stored
    monkeypatch.setattr(SafetensorsIndex, "read_stored", lambda *args: (reads.append(args[1]), stored(*args))[1])
    path = checkpoint(tmp_path / "model")
    with SafetensorsIndex.open(path) as index:
        first = weight_digests(index, cache)
        assert sorted(reads) == sorted(NAMES)
        assert weight_digests(index, cache) == first
    assert len(reads) == len(NAMES)
    with SafetensorsIndex.open(checkpoint(path, z=9.0)) as index:
        assert weight_digests(index, cache) != first
    assert len(reads) == 2 * len(NAMES)
    assert list(tmp_path.glob("*.partial")) == []


@pytest.mark.parametrize(
    "content", ["", "[]", "{not json", '{"format": 1}', '{"format": 1, "files": {}, "tensors": 3}']
)
def test_a_damaged_memory_is_made_anew(tmp_path: Path, content: str) -> None:
    cache = tmp_path / "digests.json"
    cache.write_text(content)
    with SafetensorsIndex.open(checkpoint(tmp_path / "model")) as index:
        wanted = weight_digests(index, None)
        assert weight_digests(index, cache) == wanted
        assert weight_digests(index, cache) == wanted


def test_a_full_disk_costs_the_memory_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(os, "fsync", full)
    with SafetensorsIndex.open(checkpoint(tmp_path / "model")) as index:
        assert weight_digests(index, tmp_path / "digests.json") == weight_digests(index, None)
    assert "digests_not_kept" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("name", NAMES)
def test_a_flipped_bit_is_refused_by_its_tensors_name(tmp_path: Path, name: str) -> None:
    cache, path = tmp_path / "digests.json", checkpoint(tmp_path / "model")
    with SafetensorsIndex.open(path) as index:
        weight_digests(index, cache)
        flip(path, index.ref(name).offset + 5)
    with SafetensorsIndex.open(path) as index:
        source = VerifiedSource(index, weight_digests(index, cache))
        with pytest.raises(ModelError, match=f"tensor {name} is damaged"):
            source.read(name)
        for other in set(NAMES) - {name}:
            assert source.read(other).shape == (4, 8)
            assert other in source


def test_a_file_cut_short_under_load_is_refused_by_its_tensors_name(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "model")
    with SafetensorsIndex.open(path) as index:
        source = VerifiedSource(index, weight_digests(index, None))
        last = max(NAMES, key=lambda name: index.ref(name).offset)
        os.truncate(path / "model.safetensors", index.ref(last).offset + 1)
        with pytest.raises(ModelError, match=f"{last}.* ends early"):
            source.read(last)
        with pytest.raises(ModelError, match="ends early"):
            weight_digests(index, None)


def test_reading_can_be_stopped(tmp_path: Path) -> None:
    stop = threading.Event()
    stop.set()
    with SafetensorsIndex.open(checkpoint(tmp_path)) as index, pytest.raises(ModelError, match="stopped"):
        weight_digests(index, None, stop)
