"""Reading websocket messages straight into the memory they belong in.

aiohttp makes the connection and does the handshake; from then on this protocol reads its transport (RFC 6455 5.2).
aiohttp's own reader copies a large message three to five times on its way, which alone costs more CPU than a raw socket
spends on the whole transfer, and it needs a task switch for every message. Here a large payload is read by the kernel
into its final buffer, and a small one is handed on from the loop's callback, so that nothing can delay the answer to a
ping. What peers never send is refused: fragments, text, pings, reserved bits, a wrong masking. Writing stays aiohttp's.
"""

import asyncio
import logging
from typing import Protocol

import numpy as np

from helixd.wire.errors import FrameError

_BINARY = 0x2
_CLOSE = 0x8
_PONG = 0xA
_FIN = 0x80
_MASKED = 0x80
_MAX_CONTROL_BYTES = 125
_MAX_HEADER_BYTES = 14

logger = logging.getLogger(__name__)


class MessageSink(Protocol):
    """Where messages go. Called from the event loop's callbacks: must not block, and may raise FrameError."""

    def place(self, size_bytes: int) -> memoryview | None:
        """Memory for a message of `size_bytes` that is about to be read; None to get it whole by `message`."""
        ...

    def placed(self) -> None:
        """The memory of the last `place` is filled."""
        ...

    def message(self, data: memoryview) -> None:
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


class MessageReader(asyncio.BufferedProtocol):
    """Takes the reading of a transport over from `inherited`, which still hears of flow control and of the end.

    The peer must be quiet while this happens. Reading is paused until `start`. `masked` says whether the peer is a
    websocket client; `read_ahead_bytes` is how much is read before it is known where it belongs.
    """

    def __init__(
        self, transport: asyncio.Transport, masked: bool, max_message_bytes: int, read_ahead_bytes: int
    ) -> None:
        inherited = transport.get_protocol()
        if not isinstance(inherited, asyncio.Protocol):
            raise TypeError(f"cannot take over from {type(inherited).__name__}")
        self._inherited = inherited
        self._transport = transport
        self._masked = masked
        self._max_message_bytes = max_message_bytes
        self._read_ahead_bytes = read_ahead_bytes
        self._sink: MessageSink | None = None
        self._over = False
        self._gone = False
        self._scratch = memoryview(bytearray(max_message_bytes + _MAX_HEADER_BYTES + read_ahead_bytes))
        self._start = 0
        self._end = 0
        self._wanted = 0
        self._target: memoryview | None = None
        self._target_filled = 0
        self._mask = b""
        transport.pause_reading()
        transport.set_protocol(self)

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
        return self._scratch[self._end : max(self._end + self._read_ahead_bytes, self._start + self._wanted)]

    def buffer_updated(self, count: int) -> None:
        """`count` bytes arrived there."""
        if self._over or self._sink is None:
            return
        try:
            if self._target is not None:
                self._target_filled += count
                if self._target_filled == self._target.nbytes:
                    self._finish_target(self._sink)
            else:
                self._end += count
                self._parse()
        except FrameError as error:
            self._over = True
            self._sink.broken(error)
        except Exception as error:
            self._over = True
            logger.exception("a message could not be taken in")
            self._sink.broken(FrameError(f"internal error: {error!r}"))

    def eof_received(self) -> bool:
        """The peer ended the connection; the transport closes itself."""
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the sink and aiohttp."""
        self._over = self._gone = True
        self._inherited.connection_lost(exc)
        if self._sink is not None:
            self._sink.ended(exc)

    def pause_writing(self) -> None:
        """For aiohttp's writer."""
        self._inherited.pause_writing()

    def resume_writing(self) -> None:
        """For aiohttp's writer."""
        self._inherited.resume_writing()

    def _parse(self) -> None:
        """Take everything complete out of the scratch buffer; direct a placed message's rest to its place."""
        scratch = self._scratch
        while not self._over and self._sink is not None:
            sink = self._sink
            start, available = self._start, self._end - self._start
            if available < 2:
                break
            first, second = scratch[start], scratch[start + 1]
            size, header = second & 0x7F, 2
            if size >= 126:
                header = 4 if size == 126 else 10
                if available < header:
                    break
                size = int.from_bytes(scratch[start + 2 : start + header], "big")
            if self._masked:
                header += 4
                if available < header:
                    break
                self._mask = bytes(scratch[start + header - 4 : start + header])
            self._check_header(first, second, size)
            payload = start + header
            held = min(size, self._end - payload)
            place = sink.place(size) if first & 0x0F == _BINARY else None
            if place is not None:
                place[:held] = scratch[payload : payload + held]
                self._target, self._target_filled = place, held
                self._start = payload + held
                if held < size:
                    self._start = self._end = 0
                    return
                self._finish_target(sink)
                continue
            if held < size:
                self._wanted = header + size
                break
            self._start, self._wanted = payload + size, 0
            self._deliver(sink, first & 0x0F, self._unmasked(scratch[payload : payload + size]))
        if self._start == self._end:
            self._start = self._end = self._wanted = 0
        elif self._start and self._end + self._read_ahead_bytes > len(scratch):
            held = self._end - self._start
            scratch[:held] = bytes(scratch[self._start : self._end])
            self._start, self._end = 0, held

    def _check_header(self, first: int, second: int, size: int) -> None:
        if bool(second & _MASKED) != self._masked:
            raise FrameError("a websocket frame is masked the wrong way")
        if not first & _FIN or first & 0x70 or first & 0x0F not in (_BINARY, _CLOSE, _PONG):
            raise FrameError(f"a websocket frame of sort {first:#04x} is not part of the protocol")
        if first & 0x08 and size > _MAX_CONTROL_BYTES:
            raise FrameError(f"a websocket control frame of {size} bytes")
        if size > self._max_message_bytes:
            raise FrameError(f"a message of {size} bytes exceeds the limit of {self._max_message_bytes}")

    def _deliver(self, sink: MessageSink, opcode: int, data: memoryview) -> None:
        if opcode == _BINARY:
            sink.message(data)
        elif opcode == _CLOSE:
            self._over = True
            code = int.from_bytes(data[:2], "big") if data.nbytes >= 2 else 0
            sink.closing(code, bytes(data[2:]).decode(errors="replace"))

    def _finish_target(self, sink: MessageSink) -> None:
        target, self._target = self._target, None
        if target is not None and self._masked:
            _xor(target, self._mask)
        sink.placed()

    def _unmasked(self, data: memoryview) -> memoryview:
        if not self._masked:
            return data
        copy = memoryview(bytearray(data))
        _xor(copy, self._mask)
        return copy


def _xor(data: memoryview, mask: bytes) -> None:
    """Apply a websocket mask in place."""
    whole = data.nbytes & ~3
    if whole:
        words = np.frombuffer(data[:whole], dtype=np.uint32)
        np.bitwise_xor(words, np.frombuffer(mask, dtype=np.uint32), out=words)
    for index in range(whole, data.nbytes):
        data[index] ^= mask[index - whole]
