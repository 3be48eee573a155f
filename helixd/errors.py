"""Errors that more than one room raises or handles: one type per decision the catcher makes.

The message is advice: what happened, where, what to do about it. Rooms keep narrower errors of their own.
"""

from typing import Literal


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


class JoinRefused(HelixError):
    """The coordinator does not want this worker as it is; coming back unchanged is useless: the daemon exits 77."""


class DeviceFailed(HelixError):
    """A device cannot even be measured: the daemon exits 70. Starting again helps if something else had its memory."""


class OutOfKv(HelixError):
    """A node has no KV room for what was asked; the sequence must wait or go elsewhere.

    `sequence` is the engine's id of the one that did not fit, where it is known.
    """

    def __init__(self, message: str, sequence: int | None = None) -> None:
        super().__init__(message)
        self.sequence = sequence


class NoRoute(HelixError):
    """No admissible pipeline exists for a sequence right now. `reason` is short and fit for a client.

    `cause` decides what to do: "kv" (the pipelines exist but are full: waiting helps) or "topology" (none can serve
    this sequence until nodes, links or the plan change).
    """

    def __init__(self, reason: str, *, cause: Literal["kv", "topology"] = "topology") -> None:
        super().__init__(reason)
        self.reason = reason
        self.cause = cause
