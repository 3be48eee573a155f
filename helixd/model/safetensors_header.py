"""The header of one safetensors file, checked so that every later read is a plain range inside the file.

Format: 8 bytes little-endian header length, that many bytes of JSON, then the data
(https://github.com/huggingface/safetensors#format). Reads no tensor data and trusts no number in the file.
"""

import json
import math
from dataclasses import dataclass
from typing import cast

from helixd.errors import ModelError

MAX_HEADER_BYTES = 100 * 2**20
_LENGTH_BYTES = 8
_MAX_RANK = 8

# A tensor of another dtype may lie in a file (it is never read), but its size is checked where it is known here.
DTYPE_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "F64": 8, "I64": 8, "U64": 8,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorRef:
    """Where a tensor lies: `nbytes` bytes from `offset` (from the start of the file) of the shard called `file`.

    `dtype` is `float32`, `float16` or `bfloat16`, or for a tensor that cannot be read the file's own word for it.
    """

    file: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def header_bytes(start: bytes, file_bytes: int, where: str) -> int:
    """The JSON's length, from the file's first 8 bytes. Raises ModelError for a length that cannot be."""
    if len(start) != _LENGTH_BYTES:
        raise ModelError(f"{where} is truncated: {file_bytes} bytes, too short for a safetensors file")
    length = int.from_bytes(start, "little")
    if length > MAX_HEADER_BYTES or _LENGTH_BYTES + length > file_bytes:
        raise ModelError(
            f"{where} is no safetensors file or is truncated: it states a header of {length} bytes, "
            f"the file has {file_bytes} and at most {MAX_HEADER_BYTES} are accepted"
        )
    return length


def parse_header(text: bytes, file: str, file_bytes: int, where: str) -> dict[str, TensorRef]:
    """Every tensor of the file by name. The data must be covered exactly: no overlap, no gap, nothing left over.

    Raises ModelError naming `where` and the tensor that is wrong.
    """
    try:
        header: object = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{where}: the header is not valid JSON: {error}") from error
    if not isinstance(header, dict):
        raise ModelError(f"{where}: the header is not a JSON object")
    data_start = _LENGTH_BYTES + len(text)
    tensors = {
        name: _tensor(entry, file, data_start, f"{where}: tensor {name!r}")
        for name, entry in header.items()
        if name != "__metadata__"
    }
    end = data_start
    for name, ref in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if ref.offset != end:
            kind = "overlaps the one before it" if ref.offset < end else "leaves a gap before it"
            raise ModelError(f"{where}: tensor {name!r} {kind} (starts at byte {ref.offset}, expected {end})")
        end = ref.offset + ref.nbytes
        if end > file_bytes:
            raise ModelError(
                f"{where} is truncated: tensor {name!r} ends at byte {end}, the file has {file_bytes}; "
                "download the file again"
            )
    if end != file_bytes:
        raise ModelError(f"{where}: {file_bytes - end} bytes after the last tensor belong to none; the file is damaged")
    return tensors


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def _tensor(entry: object, file: str, data_start: int, where: str) -> TensorRef:
    if not isinstance(entry, dict):
        raise ModelError(f"{where}: the entry is not an object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str):
        raise ModelError(f"{where}: no dtype")
    if not _sizes(shape) or len(cast(list[int], shape)) > _MAX_RANK:
        raise ModelError(f"{where}: bad shape {shape!r}")
    if not _sizes(offsets) or len(cast(list[int], offsets)) != 2:
        raise ModelError(f"{where}: bad data_offsets {offsets!r}")
    dims, (begin, end) = tuple(cast(list[int], shape)), cast(list[int], offsets)
    if begin > end:
        raise ModelError(f"{where}: data_offsets {offsets!r} end before they begin")
    item_bytes = _ITEM_BYTES.get(dtype)
    if item_bytes is not None and end - begin != math.prod(dims) * item_bytes:
        raise ModelError(f"{where}: {end - begin} bytes of data for shape {list(dims)} of {dtype}")
    return TensorRef(file, DTYPE_NAMES.get(dtype, dtype), dims, data_start + begin, end - begin)


def _sizes(value: object) -> bool:
    """Whether it is a list of integers that a file offset or a dimension may be."""
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)
