"""Digests of a checkpoint's tensors: what two daemons compare to know that they hold the same weights.

The fingerprint covers names, dtypes, shapes and the tokenizer; these cover the data. Two checkpoints of one fingerprint
have the same names, so their digests travel as one run of bytes in the names' order, and the first that differs names
its tensor. Computing reads every byte once; what was computed is remembered with each file's device, inode, size and
time of change, so that a restart reads nothing. Blocking: not for the event loop.
"""

import hashlib
import json
import logging
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from helixd import logs
from helixd.errors import ModelError
from helixd.files import write_whole
from helixd.model.index import SafetensorsIndex
from helixd.model.weights import RawTensor

log = logging.getLogger(__name__)

DIGEST_BYTES = 16
_PIECE_BYTES = 8 << 20
_FORMAT = 1


@dataclass(frozen=True, slots=True)
class WeightDigests:
    """BLAKE2b-128 of each tensor's data, by name."""

    by_tensor: Mapping[str, bytes]

    def packed(self) -> bytes:
        """All digests in the names' order, `DIGEST_BYTES` each."""
        return b"".join(self.by_tensor[name] for name in sorted(self.by_tensor))

    def difference(self, theirs: bytes) -> str | None:
        """What is wrong with another's `packed` digests, naming the first tensor that differs; None if nothing is."""
        names = sorted(self.by_tensor)
        if len(theirs) != len(names) * DIGEST_BYTES:
            return f"{len(theirs)} bytes of digests for {len(names)} tensors of {DIGEST_BYTES} bytes each"
        parts = [theirs[at : at + DIGEST_BYTES] for at in range(0, len(theirs), DIGEST_BYTES)]
        wrong = [name for name, part in zip(names, parts, strict=True) if part != self.by_tensor[name]]
        if not wrong:
            return None
        name = wrong[0]
        more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        there = parts[names.index(name)].hex()
        return f"tensor {name} differs (digest {there} there, {self.by_tensor[name].hex()} here){more}"


class VerifiedSource:
    """A checkpoint whose every tensor is compared with its digest as it is read; a `WeightSource`."""

    def __init__(self, index: SafetensorsIndex, digests: WeightDigests) -> None:
        self._index = index
        self._digests = digests

    def __contains__(self, name: str) -> bool:
        return name in self._index

    def read(self, name: str) -> RawTensor:
        """The tensor. Raises ModelError naming one whose data is not what it was."""
        raw = self._index.read(name)
        known = self._digests.by_tensor.get(name)
        if known is not None and tensor_digest(raw.data) != known:
            raise ModelError(
                f"tensor {name} is damaged: its data has digest {tensor_digest(raw.data).hex()}, it had {known.hex()} "
                "when the checkpoint was first read; check the disk, and get the file again"
            )
        return raw


def data_identity(index: SafetensorsIndex) -> str:
    """A word for the data of these very files, found without reading them: another one when a file is another."""
    facts = json.dumps(sorted(index.file_identities().items()))
    return hashlib.blake2b(facts.encode(), digest_size=8).hexdigest()


def tensor_digest(data: bytes | bytearray | memoryview) -> bytes:
    """Of a whole tensor's data."""
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()


def weight_digests(index: SafetensorsIndex, cache: Path | None, stop: threading.Event | None = None) -> WeightDigests:
    """Of every tensor of the checkpoint, remembered in `cache` where that can be written.

    `stop` set ends the reading early. Raises ModelError naming a tensor that cannot be read, or when stopped.
    """
    files = {name: list(identity) for name, identity in sorted(index.file_identities().items())}
    known = None if cache is None else _remembered(cache, files, frozenset(index.tensors))
    if known is not None:
        return known
    found: dict[str, bytes] = {}
    for name, ref in index.tensors.items():
        digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
        for at in range(0, ref.nbytes, _PIECE_BYTES):
            if stop is not None and stop.is_set():
                raise ModelError("stopped while the checkpoint's digests were computed")
            digest.update(index.read_stored(name, at, min(_PIECE_BYTES, ref.nbytes - at)))
        found[name] = digest.digest()
    digests = WeightDigests(found)
    if cache is not None:
        _remember(cache, files, digests)
    return digests


def _remembered(cache: Path, files: dict[str, list[int]], names: frozenset[str]) -> WeightDigests | None:
    try:
        known = json.loads(cache.read_text())
        if known["format"] != _FORMAT or known["files"] != files:
            return None
        found = {str(name): bytes.fromhex(text) for name, text in known["tensors"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    sound = found.keys() == names and all(len(digest) == DIGEST_BYTES for digest in found.values())
    return WeightDigests(found) if sound else None


def _remember(cache: Path, files: dict[str, list[int]], digests: WeightDigests) -> None:
    facts = {
        "format": _FORMAT, "files": files, "tensors": {name: part.hex() for name, part in digests.by_tensor.items()}
    }  # fmt: skip
    try:
        write_whole(cache, json.dumps(facts))
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        logs.event(log, logging.WARNING, "digests_not_kept", path=str(cache), reason=reason)
