"""Errors that more than one room raises or handles: one type per decision the catcher makes.

The message is advice: what happened, where, what to do about it. Rooms keep narrower errors of their own.
"""


class HelixError(Exception):
    """Base of every error helixd raises on purpose."""


class ConfigError(HelixError):
    """The daemon's configuration cannot be used; the daemon exits 78."""


class ModelError(HelixError):
    """A checkpoint cannot be used: unsupported feature, missing or misshapen tensor, bad file; exits 65."""


class PeerLost(HelixError):
    """Another daemon did not answer in time or closed its link. `peer` says which."""

    def __init__(self, peer: str, reason: str) -> None:
        super().__init__(f"peer {peer}: {reason}")
        self.peer = peer
        self.reason = reason


class OutOfKv(HelixError):
    """A node has no KV room for what was asked; the sequence must wait or go elsewhere."""


class NoRoute(HelixError):
    """No admissible pipeline exists for a sequence right now. `reason` is short and fit for a client."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
