"""Who is there: mutual challenge-response on a fresh websocket, before any frame and before any msgpack.

Four binary messages of fixed format. Dialer: hello (versions, purpose, identity, link token, nonce). Listener: its own
hello. Dialer: proof. Listener: proof. A proof is HMAC-SHA256 under the cluster secret over the role of who proves and
both hellos as sent, so it covers magic, versions, roles, ids, incarnations, purpose, token and both nonces. The dialer
proves first: a listener computes nothing for strangers. Without a secret the same exchange runs under an empty key.

The secret proves membership; it does not encrypt what follows.
"""

import hashlib
import hmac
import os
import struct
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from aiohttp import WSMsgType

from helixd.errors import ConfigError, PeerLost
from helixd.ids import Incarnation, PeerId
from helixd.wire.channel import WebSocket
from helixd.wire.errors import AuthRejected, CloseCode, PeerRefused, VersionMismatch
from helixd.wire.peers import INSTANCE_BYTES, MAX_PEER_ID_BYTES, PeerIdentity

PROTOCOL_VERSION = 1
OLDEST_VERSION = 1
NONCE_BYTES = 32
TOKEN_BYTES = 16
MIN_SECRET_BYTES = 32
MAX_MESSAGE_BYTES = 1024

_MAGIC = b"HLXD"
_VERSIONS = struct.Struct("!4sHH")
_HELLO = struct.Struct(f"!4sHHBQ{INSTANCE_BYTES}s{TOKEN_BYTES}s{NONCE_BYTES}sB")
_PROOF_BYTES = len(_MAGIC) + hashlib.sha256().digest_size
_DIALER = b"dialer"
_LISTENER = b"listener"


class Purpose(IntEnum):
    """Which of a link's two sockets this is."""

    CONTROL = 0
    BULK = 1


class HandshakeFailed(Exception):
    """The other side must be told: close the websocket with `code` and `reason`."""

    def __init__(self, code: CloseCode, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Hello:
    """One side's introduction. `token` ties a link's two sockets together."""

    identity: PeerIdentity
    purpose: Purpose
    token: bytes
    nonce: bytes
    oldest_version: int = OLDEST_VERSION
    newest_version: int = PROTOCOL_VERSION

    def encode(self) -> bytes:
        """The message."""
        name = self.identity.peer.encode()
        fixed = _HELLO.pack(
            _MAGIC,
            self.oldest_version,
            self.newest_version,
            self.purpose,
            self.identity.incarnation,
            self.identity.instance,
            self.token,
            self.nonce,
            len(name),
        )
        return fixed + name

    @classmethod
    def decode(cls, message: bytes) -> "Hello":
        """Raises HandshakeFailed for anything but a well-formed hello of a version we speak."""
        if len(message) < _VERSIONS.size or message[: len(_MAGIC)] != _MAGIC:
            raise HandshakeFailed(CloseCode.BAD_HELLO, "not a helixd peer")
        _, oldest, newest = _VERSIONS.unpack_from(message)
        if oldest > PROTOCOL_VERSION or newest < OLDEST_VERSION:
            raise HandshakeFailed(
                CloseCode.VERSION_MISMATCH,
                f"peer protocol {oldest}..{newest} meets {OLDEST_VERSION}..{PROTOCOL_VERSION}: upgrade the older",
            )
        try:
            _, _, _, purpose, incarnation, instance, token, nonce, name_bytes = _HELLO.unpack_from(message)
            name = message[_HELLO.size :]
            if len(name) != name_bytes or name_bytes > MAX_PEER_ID_BYTES:
                raise ValueError("name length")
            identity = PeerIdentity(PeerId(name.decode()), Incarnation(incarnation), instance)
            return cls(identity, Purpose(purpose), token, nonce, oldest, newest)
        except (struct.error, ValueError) as error:
            raise HandshakeFailed(CloseCode.BAD_HELLO, "malformed hello") from error


def new_hello(identity: PeerIdentity, purpose: Purpose, token: bytes) -> Hello:
    """Our hello for one socket, with a fresh nonce."""
    return Hello(identity, purpose, token, os.urandom(NONCE_BYTES))


def _proof(secret: bytes, role: bytes, dialer_hello: bytes, listener_hello: bytes) -> bytes:
    mac = hmac.new(secret, digestmod=hashlib.sha256)
    for part in (role, dialer_hello, listener_hello):
        mac.update(struct.pack("!I", len(part)) + part)
    return _MAGIC + mac.digest()


def _check_proof(message: bytes, expected: bytes, complaint: str) -> None:
    if len(message) != _PROOF_BYTES or not hmac.compare_digest(message, expected):
        raise HandshakeFailed(CloseCode.AUTH_REJECTED, complaint)


class DialerHandshake:
    """The dialer's half over one websocket: `greet`, then `prove`."""

    def __init__(self, ws: WebSocket, hello: Hello, secret: bytes | None, where: str) -> None:
        self._ws = ws
        self._hello = hello
        self._secret = secret or b""
        self._where = where
        self._ours = hello.encode()
        self._theirs = b""

    async def greet(self) -> Hello:
        """Exchange hellos; the answer is not proven yet. Raises HandshakeFailed, or what the close code means."""
        await self._ws.send_bytes(self._ours)
        self._theirs = await receive_message(self._ws, self._where)
        answer = Hello.decode(self._theirs)
        if answer.token != self._hello.token or answer.purpose != self._hello.purpose:
            raise HandshakeFailed(CloseCode.BAD_HELLO, "the hello answers another one")
        return answer

    async def prove(self) -> None:
        """Exchange proofs; when it returns, both sides know the secret and the listener wants the link."""
        await self._ws.send_bytes(_proof(self._secret, _DIALER, self._ours, self._theirs))
        answer = await receive_message(self._ws, self._where)
        expected = _proof(self._secret, _LISTENER, self._ours, self._theirs)
        _check_proof(answer, expected, "the listener does not know the cluster secret")


class ListenerHandshake:
    """The listener's half over one websocket: `challenge`, then `welcome`."""

    def __init__(self, ws: WebSocket, identity: PeerIdentity, secret: bytes | None, where: str) -> None:
        self._ws = ws
        self._identity = identity
        self._secret = secret or b""
        self._where = where
        self._ours = b""
        self._theirs = b""

    async def challenge(self) -> Hello:
        """The dialer's hello, proven. Raises HandshakeFailed, or PeerLost when the dialer left."""
        self._theirs = await receive_message(self._ws, self._where)
        hello = Hello.decode(self._theirs)
        self._ours = new_hello(self._identity, hello.purpose, hello.token).encode()
        await self._ws.send_bytes(self._ours)
        answer = await receive_message(self._ws, self._where)
        expected = _proof(self._secret, _DIALER, self._theirs, self._ours)
        _check_proof(answer, expected, "wrong cluster secret")
        return hello

    async def welcome(self) -> None:
        """Prove ourselves, which also says that the link is wanted."""
        await self._ws.send_bytes(_proof(self._secret, _LISTENER, self._theirs, self._ours))


async def receive_message(ws: WebSocket, where: str) -> bytes:
    """The next binary message of a handshake; the caller keeps the deadline.

    Raises HandshakeFailed for a message that cannot belong to one, and what its close code means when the other side
    closed: AuthRejected, VersionMismatch, PeerRefused, else PeerLost.
    """
    message = await ws.receive()
    if message.type is WSMsgType.BINARY:
        if len(message.data) > MAX_MESSAGE_BYTES:
            raise HandshakeFailed(CloseCode.BAD_HELLO, "message too large before authentication")
        return bytes(message.data)
    if message.type is WSMsgType.CLOSE:
        raise closed_error(where, message.data or 0, message.extra or "")
    if message.type in (WSMsgType.CLOSED, WSMsgType.CLOSING, WSMsgType.ERROR):
        raise PeerLost(where, "closed the connection during the handshake")
    raise HandshakeFailed(CloseCode.BAD_HELLO, "only binary messages are part of the handshake")


def closed_error(where: str, code: int, reason: str) -> Exception:
    """What a close code of the other side means to us."""
    if code == CloseCode.AUTH_REJECTED:
        return AuthRejected(where, reason or "authentication rejected")
    if code == CloseCode.VERSION_MISMATCH:
        return VersionMismatch(f"{where}: {reason}")
    if code in (CloseCode.REFUSED, CloseCode.DUPLICATE, CloseCode.YIELDED):
        return PeerRefused(where, code, reason)
    return PeerLost(where, f"closed the connection during the handshake ({code} {reason})".replace(" )", ")"))


def read_secret(path: Path, *, guarded: bool = False) -> bytes:
    """The cluster secret in `path`, stripped of surrounding white space.

    Raises ConfigError if it cannot be read, if others than its owner may access it (unless it is `guarded` by its
    directory), or below 32 bytes.
    """
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            secret = file.read(64 * 1024).strip()
    except OSError as error:
        raise ConfigError(f"cluster secret {path} cannot be read: {error.strerror or error}") from error
    if mode & 0o077 and not guarded:
        raise ConfigError(f"cluster secret {path} has mode {mode & 0o777:o}; run: chmod 600 {path}")
    if len(secret) < MIN_SECRET_BYTES:
        raise ConfigError(
            f"cluster secret {path} holds {len(secret)} bytes, at least {MIN_SECRET_BYTES} are needed; "
            f"make one with: head -c 32 /dev/urandom | base64 > {path}"
        )
    return secret
