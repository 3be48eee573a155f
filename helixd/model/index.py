"""The tensors of a checkpoint by name, read one at a time from open safetensors files.

Decides which files belong to the checkpoint and whether they can be trusted; reads with `pread` into owned memory,
never through a mapping. Does not know what the tensors are for: that is `helixd.model.names`. The files stay open, so
a checkpoint that is replaced by renaming is still read as the one that was checked. Blocking: not for the event loop.
"""

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Self

from helixd.errors import ModelError
from helixd.model.decoder import DTYPE_BYTES
from helixd.model.files import read_bytes, read_json_object, resolve_inside
from helixd.model.safetensors_header import TensorRef, header_bytes, parse_header
from helixd.model.weights import RawTensor

_SINGLE = "model.safetensors"
_SHARDED = "model.safetensors.index.json"
_SHARD_NAME = re.compile(r"[A-Za-z0-9._-]+\.safetensors")
_MAX_SHARDS = 1000


class SafetensorsIndex:
    """The one owner of a checkpoint's open files; a `WeightSource`. Safe to read from several threads."""

    def __init__(self, tensors: Mapping[str, TensorRef], files: Mapping[str, int], model_dir: Path) -> None:
        self._tensors = MappingProxyType(dict(tensors))
        self._files = dict(files)
        self._model_dir = model_dir
        self._file_bytes = {name: os.fstat(fd).st_size for name, fd in files.items()}

    @classmethod
    def open(cls, model_dir: Path) -> Self:
        """Opens and checks every shard's header. Raises ModelError naming the file, and the tensor, that is wrong."""
        weight_map = _weight_map(model_dir)
        names = {_SINGLE} if weight_map is None else set(weight_map.values())
        files: dict[str, int] = {}
        try:
            headers: dict[str, dict[str, TensorRef]] = {}
            for name in sorted(names):
                files[name] = _open_shard(model_dir, name)
                headers[name] = _read_header(files[name], name, str(model_dir / name))
            if weight_map is None:
                return cls(headers[_SINGLE], files, model_dir)
            tensors: dict[str, TensorRef] = {}
            for tensor, name in weight_map.items():
                if tensor not in headers[name]:
                    raise ModelError(f"{model_dir / name} has no tensor {tensor!r}, though {_SHARDED} says so")
                tensors[tensor] = headers[name][tensor]
            return cls(tensors, files, model_dir)
        except BaseException:
            for fd in files.values():
                os.close(fd)
            raise

    @property
    def tensors(self) -> Mapping[str, TensorRef]:
        """Every tensor by name, read-only."""
        return self._tensors

    @property
    def shard_bytes(self) -> Mapping[str, int]:
        """Size of each file when it was opened."""
        return self._file_bytes

    def file_identities(self) -> Mapping[str, tuple[int, int, int, int]]:
        """Each open file's device, inode, size and time of change (ns): another content has another identity."""
        states = {name: os.fstat(fd) for name, fd in self._files.items()}
        return {name: (s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns) for name, s in states.items()}

    def __contains__(self, name: str) -> bool:
        """Whether the checkpoint has a tensor of that name."""
        return name in self._tensors

    def ref(self, name: str) -> TensorRef:
        """Where a tensor lies. Raises ModelError naming a tensor that is missing or of a dtype that is not read."""
        ref = self._tensors.get(name)
        if ref is None:
            raise ModelError(
                f"{self._model_dir} has no tensor {name!r}; the checkpoint is incomplete or not this model"
            )
        if ref.dtype not in DTYPE_BYTES:
            raise ModelError(f"{self._model_dir}: tensor {name!r} is {ref.dtype}; supported: {', '.join(DTYPE_BYTES)}")
        return ref

    def read(self, name: str) -> RawTensor:
        """The whole tensor. Raises ModelError naming a tensor that is missing, truncated or of a bad dtype."""
        ref = self.ref(name)
        return RawTensor(ref.dtype, ref.shape, self.read_range(name, 0, ref.nbytes))

    def read_range(self, name: str, offset: int, length: int) -> bytearray:
        """`length` bytes of a tensor from byte `offset` of it, for a peer that has no copy of the file.

        Raises ModelError as `ref` does, for a range that is not within the tensor, and for a file cut short since.
        """
        return self._read(name, self.ref(name), offset, length)

    def read_stored(self, name: str, offset: int, length: int) -> bytearray:
        """As `read_range`, of a tensor of any dtype."""
        return self._read(name, self._tensors[name], offset, length)

    def _read(self, name: str, ref: TensorRef, offset: int, length: int) -> bytearray:
        if not (0 <= offset and 0 <= length and offset + length <= ref.nbytes):
            raise ModelError(f"tensor {name!r} has {ref.nbytes} bytes; no {length} bytes at {offset}")
        fd = self._files.get(ref.file)
        if fd is None:
            raise ModelError(f"{self._model_dir} was closed; tensor {name!r} cannot be read any more")
        data = bytearray(length)
        view, done = memoryview(data), 0
        while done < length:
            try:
                count = os.preadv(fd, [view[done:]], ref.offset + offset + done)
            except OSError as error:
                raise ModelError(f"{self._model_dir / ref.file}: tensor {name!r} cannot be read ({error})") from error
            if count == 0:
                raise ModelError(
                    f"{self._model_dir / ref.file} was cut short while in use: tensor {name!r} ends early; "
                    "replace files of a served model by renaming only"
                )
            done += count
        return data

    def close(self) -> None:
        """Closes the files; later reads fail. May be called twice."""
        for fd in self._files.values():
            os.close(fd)
        self._files = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def fingerprint(model_dir: Path, index: SafetensorsIndex) -> str:
    """What two daemons compare to know that they mean the same model: 32 hex digits.

    Covers config.json, tokenizer.json, every tensor's name, dtype and shape, and the shards' sizes. Cheap: it reads no
    weights, so it does not notice other weights of the same shapes.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name in ("config.json", "tokenizer.json"):
        content = read_bytes(model_dir, name) or b""
        digest.update(f"{name} {len(content)}\n".encode())
        digest.update(content)
    for tensor in sorted(index.tensors):
        ref = index.tensors[tensor]
        digest.update(f"{tensor!r} {ref.dtype} {ref.shape}\n".encode())
    for size in sorted(index.shard_bytes.values()):
        digest.update(f"{size}\n".encode())
    return digest.hexdigest()


def _weight_map(model_dir: Path) -> dict[str, str] | None:
    """Tensor -> shard name of a sharded checkpoint, None for a single file. Raises ModelError for neither."""
    if resolve_inside(model_dir, _SINGLE) is not None:
        return None
    data = read_json_object(model_dir, _SHARDED)
    if data is None:
        raise ModelError(
            f"{model_dir} has neither {_SINGLE} nor {_SHARDED}; only safetensors checkpoints are read, "
            "convert others (pickled .bin or .pt files are never opened)"
        )
    weight_map = data.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{model_dir / _SHARDED} has no weight_map")
    for name in set(map(str, weight_map.values())):
        if not _SHARD_NAME.fullmatch(name):
            raise ModelError(f"{model_dir / _SHARDED}: shard name {name!r} must be a plain name ending in .safetensors")
    if len(set(weight_map.values())) > _MAX_SHARDS:
        raise ModelError(f"{model_dir / _SHARDED} names more than {_MAX_SHARDS} shards")
    return {str(tensor): str(name) for tensor, name in weight_map.items()}


def _open_shard(model_dir: Path, name: str) -> int:
    path = resolve_inside(model_dir, name)
    if path is None:
        raise ModelError(f"{model_dir / name} is missing; download the checkpoint completely")
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise ModelError(f"{path}: cannot be opened ({error})") from error


def _read_header(fd: int, name: str, where: str) -> dict[str, TensorRef]:
    file_bytes = os.fstat(fd).st_size
    length = header_bytes(os.pread(fd, 8, 0), file_bytes, where)
    text = os.pread(fd, length, 8)
    if len(text) != length:
        raise ModelError(f"{where} was cut short while it was being read")
    return parse_header(text, name, file_bytes, where)
