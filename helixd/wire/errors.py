"""What can go wrong between two daemons beyond a lost peer: one type per decision the caller makes.

Retry later: `helixd.errors.PeerLost`. Do not retry, the operator must act: `AuthRejected`, `VersionMismatch`. Ask who
else claims this name, or fix the address: `PeerRefused`. A caller's own frame cannot be sent: `FrameError`.
"""

from enum import IntEnum

from helixd.errors import HelixError


class CloseCode(IntEnum):
    """Websocket close codes of the peer protocol (the 4000 block is free for applications, RFC 6455 7.4.2)."""

    NORMAL = 4000
    BAD_HELLO = 4400
    AUTH_REJECTED = 4401
    REFUSED = 4403
    VERSION_MISMATCH = 4406
    AUTH_TIMEOUT = 4408
    DUPLICATE = 4409
    YIELDED = 4410
    NOT_NOW = 4503
    """Dial again later. Daemons that do not know this code do so too."""


class FrameError(HelixError):
    """A frame breaks the codec's limits: refused before sending, or the reason a link is closed when received."""


class AuthRejected(HelixError):
    """The other side explicitly refused our proof of the cluster secret, or could not prove it itself."""

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(f"{where}: {reason}; every daemon of a cluster needs the same secret file")
        self.where = where


class VersionMismatch(HelixError):
    """The two daemons share no version of the peer protocol. The message names both ranges."""


class PeerRefused(HelixError):
    """The other side is authenticated but does not want this link. `code` is the close code, `reason` its words."""

    def __init__(self, where: str, code: int, reason: str) -> None:
        super().__init__(f"{where} refused the link: {reason}")
        self.where = where
        self.code = code
        self.reason = reason
