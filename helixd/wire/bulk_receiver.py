"""Putting large payloads together from the messages of one bulk socket, in the memory their handler will own."""

from typing import Protocol

import numpy as np

from helixd.wire.credits import CreditReturn
from helixd.wire.errors import FrameError
from helixd.wire.frames import decode_bulk_header
from helixd.wire.options import WireOptions


def empty_buffer(size_bytes: int) -> memoryview:
    """Writable memory of `size_bytes` that nobody has zeroed first."""
    return np.empty(size_bytes, dtype=np.uint8).data


class BulkOwner(Protocol):
    """Who is told what arrived; the link."""

    def heard(self, size_bytes: int) -> None:
        """A message of that size came."""
        ...

    def bulk_arrived(self, kind: int, body: object, payload: memoryview | None, charge: int) -> None:
        """A frame is whole. `payload` is None for the discarded kind."""
        ...

    def bulk_abandoned(self, charge: int) -> None:
        """The sender gave a frame up."""
        ...

    def bulk_closing(self, reason: str) -> None:
        """The peer's close frame."""
        ...

    def bulk_ended(self) -> None:
        """The connection is gone."""
        ...

    def broken(self, error: FrameError) -> None:
        """The peer broke the protocol."""
        ...


class BulkReceiver:
    """A `MessageSink`. Payloads of `discard_kind` (bandwidth probes) are counted, not kept."""

    def __init__(self, owner: BulkOwner, options: WireOptions, discard_kind: int) -> None:
        self.credits = CreditReturn(options.bulk_window_bytes)
        self._owner = owner
        self._options = options
        self._discard_kind = discard_kind
        self._header: tuple[int, object, int] | None = None
        self._charge = 0
        self._payload: memoryview | None = None
        self._filled = 0
        self._placed_bytes = 0

    def place(self, size_bytes: int) -> memoryview | None:
        """The next part of the frame under way; None for headers and for the mark of an abandoned frame."""
        if self._header is None or size_bytes == 0:
            return None
        kind, _, payload_bytes = self._header
        end = self._filled + size_bytes
        if end > payload_bytes:
            raise FrameError(f"a bulk frame of kind {kind} announced {payload_bytes} bytes and carries more")
        self._placed_bytes = size_bytes
        if self._payload is None:
            return empty_buffer(size_bytes)
        return self._payload[self._filled : end]

    def placed(self) -> None:
        """A chunk is complete, and perhaps the frame."""
        self._owner.heard(self._placed_bytes)
        self._filled += self._placed_bytes
        if self._header is not None and self._filled == self._header[2]:
            (kind, body, _), payload = self._header, self._payload
            self._header = self._payload = None
            self._owner.bulk_arrived(kind, body, payload, self._charge)

    def message(self, data: memoryview | bytearray) -> None:
        """A header, or the mark of an abandoned frame."""
        self._owner.heard(len(data))
        if self._header is not None:
            self._header = self._payload = None
            self._owner.bulk_abandoned(self._charge)
            return
        header = decode_bulk_header(data, self._options.max_body_bytes, self._options.max_frame_bytes)
        kind, _, payload_bytes = header
        charge = self.credits.took(payload_bytes)
        self._payload = None if kind == self._discard_kind else empty_buffer(payload_bytes)
        self._header, self._charge, self._filled = header, charge, 0

    def closing(self, code: int, reason: str) -> None:
        """The peer's close frame."""
        self._owner.bulk_closing(reason or str(code))

    def broken(self, error: FrameError) -> None:
        """The peer broke the protocol."""
        self._owner.broken(error)

    def ended(self, _: Exception | None) -> None:
        """The connection is gone."""
        self._owner.bulk_ended()
