"""The websocket framing of peer sockets once aiohttp has made the connection (RFC 6455 5.2), without needless copies.

aiohttp's own reader copies a large message three to five times on its way, which alone costs more CPU than a raw socket
spends on the whole transfer, and it needs a task switch for every message. Here a large payload is read by the kernel
into its final buffer, and a small one is handed on from the loop's callback, so that nothing can delay the answer to a
ping. Writing hands a server's payload to the transport as it is; a client's is masked in one pass.

What peers never send is refused: fragments, text, pings, reserved bits, a wrong masking.
"""

import asyncio
import logging
import os
import struct
from typing import Protocol

import numpy as np
from aiohttp._websocket.helpers import websocket_mask

from helixd import logs
from helixd.wire.errors import FrameError

_BINARY = 0x2
_CLOSE = 0x8
_PONG = 0xA
_FIN = 0x80
_MASKED = 0x80
_MESSAGE = _FIN | _BINARY
_FAREWELL = _FIN | _CLOSE
_MAX_CONTROL_BYTES = 125
_MAX_HEADER_BYTES = 14

# A message up to this size is joined with its header, so that it leaves as one segment. Its length fits into 16 bits.
_JOINED_BYTES = 0xFFFF
_MASK_POOL_BYTES = 4096
_MAX_REASON_BYTES = 120
_PACK_16 = struct.Struct("!BBH").pack
_PACK_32_32 = struct.Struct("!II").pack
_INT_32 = struct.Struct("!I").unpack
_START = struct.Struct("!HH").unpack_from
_PACK_64 = struct.Struct("!BBQ").pack

logger = logging.getLogger(__name__)


class MessageSink(Protocol):
    """Where messages go. Called from the event loop's callbacks: must not block, and may raise FrameError."""

    def place(self, size_bytes: int) -> memoryview | None:
        """Memory for a message of `size_bytes` that is about to be read; None to get it whole by `message`."""
        ...

    def placed(self) -> None:
        """The memory of the last `place` is filled."""
        ...

    def message(self, data: memoryview | bytearray) -> None:
        """A message that had no place; `data` is valid during the call only."""
        ...

    def closing(self, code: int, reason: str) -> None:
        """The peer's close frame; nothing follows it."""
        ...

    def broken(self, error: FrameError) -> None:
        """The peer broke the protocol; nothing more is read."""
        ...

    def ended(self, error: Exception | None) -> None:
        """The connection is gone. Called once."""
        ...


class MessageStream(asyncio.BufferedProtocol):
    """Takes a transport over from aiohttp's protocol, which from then on only hears of the connection's end.

    The peer must be quiet while this happens. Reading is paused until `start`. `dialed` says that we are the websocket
    client: our frames are masked, the peer's are not. `read_ahead_bytes` is how much is read before it is known where
    it belongs; `places` says whether sinks are asked for places. One task at a time may wait in `drain` or `flush`.
    """

    __slots__ = (
        "_ahead", "_dialed", "_end", "_gone", "_inherited", "_mask", "_mask_at", "_masked", "_masks",
        "_max_message_bytes", "_over", "_places", "_read_ahead_bytes", "_scratch", "_sink", "_start", "_target",
        "_target_filled", "_transport", "_usual_payload", "_usual_start", "_wanted", "_writable",
    )  # fmt: skip

    def __init__(
        self, transport: asyncio.Transport, dialed: bool, max_message_bytes: int, read_ahead_bytes: int, places: bool
    ) -> None:
        inherited = transport.get_protocol()
        if not isinstance(inherited, asyncio.Protocol):
            raise TypeError(f"cannot take over from {type(inherited).__name__}")
        self._inherited = inherited
        self._transport = transport
        self._dialed = dialed
        self._masked = 0 if dialed else _MASKED
        self._places = places
        self._masks = b""
        self._mask_at = _MASK_POOL_BYTES
        # The first bytes of nearly every small message: whole, and with a length of two bytes.
        self._usual_start = _MESSAGE << 8 | self._masked | 126
        self._usual_payload = 4 if dialed else 8
        self._max_message_bytes = max_message_bytes
        self._read_ahead_bytes = read_ahead_bytes
        self._sink: MessageSink | None = None
        self._over = False
        self._gone = False
        self._writable = asyncio.Event()
        self._writable.set()
        self._scratch = memoryview(bytearray(max_message_bytes + _MAX_HEADER_BYTES + read_ahead_bytes))
        self._ahead = self._scratch[:read_ahead_bytes]
        self._start = 0
        self._end = 0
        self._wanted = 0
        self._target: memoryview | None = None
        self._target_filled = 0
        self._mask = b""
        transport.pause_reading()
        transport.set_protocol(self)

    def write(self, message: bytes | memoryview, more: bytes | memoryview = b"", first: int = _MESSAGE) -> None:
        """Hand one message, `message` with `more` behind it, to the transport. Raises ConnectionError.

        It is copied, except for a listener's large message without more, which is kept by reference: see `flush`.
        """
        transport = self._transport
        if transport.is_closing():
            raise ConnectionResetError("the connection is closing")
        size = len(message) + len(more)
        if self._dialed:
            transport.write(self._masked_frame(first, message, more, size))
        elif 126 <= size <= _JOINED_BYTES:
            transport.write(b"".join((_PACK_16(first, 126, size), message, more)))
        elif size <= _JOINED_BYTES or more:
            transport.write(b"".join((_header(first, 0, size), message, more)))
        else:
            transport.write(_header(first, 0, size))
            transport.write(message)

    def _masked_frame(
        self, first: int, message: bytes | memoryview, more: bytes | memoryview, size: int
    ) -> bytearray | memoryview:
        """A client's frame. Its header passes through the mask too, masked beforehand: that is one copy less."""
        at = self._mask_at
        if at >= _MASK_POOL_BYTES:
            self._masks, at = os.urandom(_MASK_POOL_BYTES), 0
        self._mask_at = at + 4
        mask = self._masks[at : at + 4]
        if 126 <= size <= _JOINED_BYTES:
            header = _PACK_32_32((first << 24 | 0xFE0000 | size) ^ _INT_32(mask)[0], 0)
            frame = bytearray().join((header, message, more))
            websocket_mask(mask, frame)
            return frame
        header = _header(first, _MASKED, size) + mask
        if more or size < 126:
            masked = bytearray().join((message, more))
            websocket_mask(mask, masked)
            return bytearray().join((header, masked))
        whole = np.empty(len(header) + size, dtype=np.uint8).data
        whole[: len(header)] = header
        _xor(message, mask, whole[len(header) :])
        return whole

    def write_close(self, code: int, reason: str) -> None:
        """A close frame; nothing may be written after it. Raises ConnectionError."""
        told = reason.encode()[:_MAX_REASON_BYTES].decode(errors="ignore").encode()
        self.write(code.to_bytes(2, "big") + told, first=_FAREWELL)

    async def drain(self) -> None:
        """Wait while the transport holds more than its high-water mark. Raises ConnectionError."""
        if not self._writable.is_set():
            await self._writable.wait()
        if self._gone:
            raise ConnectionResetError("the connection is gone")

    async def flush(self) -> None:
        """Wait until the transport refers to no message any more. Raises ConnectionError."""
        if self._dialed or not self._transport.get_write_buffer_size():
            return
        # With both limits at zero the transport counts as paused until it is empty.
        self._transport.set_write_buffer_limits(high=0)
        try:
            await self.drain()
        finally:
            self._transport.set_write_buffer_limits()

    @property
    def closing(self) -> bool:
        """Whether nothing can be written any more."""
        return self._transport.is_closing()

    def close(self) -> None:
        """End the connection when what was written has left."""
        self._transport.close()

    def abort(self) -> None:
        """Cut the connection, whatever is buffered."""
        self._transport.abort()

    def start(self, sink: MessageSink) -> None:
        """Begin to deliver messages, or deliver them to another sink from the next one on."""
        first, self._sink = self._sink is None, sink
        if self._gone:
            sink.ended(None)
        elif first:
            self._transport.resume_reading()

    def stop(self) -> None:
        """Deliver nothing more; what still arrives is thrown away."""
        self._over = True

    def get_buffer(self, _: int) -> memoryview:
        """Where the next bytes go: the rest of a placed message, else the scratch buffer."""
        if self._target is not None:
            return self._target[self._target_filled :]
        if not self._end:
            return self._ahead
        return self._scratch[self._end : max(self._end + self._read_ahead_bytes, self._start + self._wanted)]

    def buffer_updated(self, count: int) -> None:
        """`count` bytes arrived there."""
        sink = self._sink
        if self._over or sink is None:
            return
        try:
            if self._target is not None:
                self._target_filled += count
                if self._target_filled == self._target.nbytes:
                    self._finish_target(sink)
                return
            if not self._end and not self._places:
                # The usual case by the shortest way: exactly one small message came.
                scratch, payload = self._scratch, self._usual_payload
                start, size = _START(scratch)
                if start == self._usual_start and size == count - payload:
                    if payload == 4:
                        sink.message(scratch[4:count])
                    else:
                        data = bytearray(scratch[8:count])
                        websocket_mask(bytes(scratch[4:8]), data)
                        sink.message(data)
                    return
            self._end += count
            self._parse()
        except FrameError as error:
            self._over = True
            sink.broken(error)
        except Exception as error:
            self._over = True
            logs.event(logger, logging.ERROR, "message_failed", exc_info=True)
            sink.broken(FrameError(f"internal error: {error!r}"))

    def eof_received(self) -> bool:
        """The peer ended the connection; the transport closes itself."""
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the sink and aiohttp."""
        self._over = self._gone = True
        self._writable.set()
        self._inherited.connection_lost(exc)
        if self._sink is not None:
            self._sink.ended(exc)

    def pause_writing(self) -> None:
        """The transport holds enough."""
        self._writable.clear()

    def resume_writing(self) -> None:
        """The transport wants more."""
        self._writable.set()

    def _parse(self) -> None:
        """Take everything complete out of the scratch buffer; direct a placed message's rest to its place."""
        scratch = self._scratch
        while not self._over and self._sink is not None:
            start, end = self._start, self._end
            if end - start < 2:
                break
            first, second = scratch[start], scratch[start + 1]
            size, payload = second & 0x7F, start + 2
            if size >= 126:
                payload += 2 if size == 126 else 8
                if end < payload:
                    break
                size = int.from_bytes(scratch[start + 2 : payload], "big")
            if self._masked:
                payload += 4
                if end < payload:
                    break
                self._mask = bytes(scratch[payload - 4 : payload])
            if first != _MESSAGE or second & _MASKED != self._masked or size > self._max_message_bytes:
                self._check_rare(first, second, size)
            elif self._places and self._place(self._sink, payload, size):
                continue
            after = payload + size
            if end < after:
                self._wanted = after - start
                break
            self._start, self._wanted = after, 0
            data: bytearray | memoryview = scratch[payload:after]
            if self._masked:
                data = bytearray(data)
                websocket_mask(self._mask, data)
            if first == _MESSAGE:
                self._sink.message(data)
            elif first == _FAREWELL:
                self._over = True
                code = int.from_bytes(data[:2], "big") if size >= 2 else 0
                self._sink.closing(code, bytes(data[2:]).decode(errors="replace"))
        if self._start == self._end:
            self._start = self._end = self._wanted = 0
        elif self._start and self._end + self._read_ahead_bytes > len(scratch):
            held = self._end - self._start
            scratch[:held] = bytes(scratch[self._start : self._end])
            self._start, self._end = 0, held

    def _place(self, sink: MessageSink, payload: int, size: int) -> bool:
        """Whether the message at `payload` has a place of its own; if so, what is here of it goes there."""
        place = sink.place(size)
        if place is None:
            return False
        held = min(size, self._end - payload)
        place[:held] = self._scratch[payload : payload + held]
        self._target, self._target_filled = place, held
        self._start = payload + held
        if held == size:
            self._finish_target(sink)
        return True

    def _check_rare(self, first: int, second: int, size: int) -> None:
        if second & _MASKED != self._masked:
            raise FrameError("a websocket frame is masked the wrong way")
        if first not in (_MESSAGE, _FAREWELL, _FIN | _PONG):
            raise FrameError(f"a websocket frame of sort {first:#04x} is not part of the protocol")
        limit = self._max_message_bytes if first == _MESSAGE else _MAX_CONTROL_BYTES
        if size > limit:
            raise FrameError(f"a websocket message of {size} bytes exceeds the limit of {limit}")

    def _finish_target(self, sink: MessageSink) -> None:
        target, self._target = self._target, None
        if target is not None and self._masked:
            _xor(target, self._mask, target)
        sink.placed()


def _header(first: int, mask_bit: int, size: int) -> bytes:
    """The first bytes of a frame of any size, without the mask."""
    if size < 126:
        return bytes((first, mask_bit | size))
    if size < 65536:
        return _PACK_16(first, mask_bit | 126, size)
    return _PACK_64(first, mask_bit | 127, size)


def _xor(source: bytes | memoryview, mask: bytes, target: memoryview) -> None:
    """Write `source` into `target` with a websocket mask applied; they may be the same memory."""
    whole = len(source) & ~3
    if whole:
        words = np.frombuffer(source, dtype=np.uint32, count=whole >> 2)
        np.bitwise_xor(words, np.frombuffer(mask, dtype=np.uint32), out=np.frombuffer(target[:whole], dtype=np.uint32))
    for index in range(whole, len(source)):
        target[index] = source[index] ^ mask[index - whole]
