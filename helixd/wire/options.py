"""Every number of the wire that an operator may turn, with its default and the reason for it."""

from dataclasses import dataclass

KIB = 1024
MIB = 1024 * KIB


@dataclass(frozen=True, slots=True)
class WireOptions:
    """Limits and timers of one daemon's peer links. Raises ValueError for values that contradict each other.

    `ping_interval_s`, `dead_after_s`: liveness; a peer from which nothing was heard for `dead_after_s` is lost.
    `send_deadline_s`: a link whose peer takes nothing of what waits to be sent for this long is closed.
    `small_payload_bytes`: larger payloads travel over the bulk socket in messages of `chunk_bytes`.
    `small_window_bytes`, `bulk_window_bytes`: what a peer may have sent that our handlers have not finished. The small
    window bounds how long a ping can wait behind frames of its own socket: 1 MiB is one second at 8 Mbit/s.
    `max_frame_bytes`: largest payload accepted; `max_body_bytes`: largest encoded body.
    `congestion_control`, `notsent_lowat_bytes`: set on every peer socket where given and the kernel knows them.
    """

    ping_interval_s: float = 0.5
    dead_after_s: float = 3.0
    send_deadline_s: float = 30.0
    close_timeout_s: float = 1.0
    auth_timeout_s: float = 5.0
    max_pending: int = 64
    preauth_bytes: int = 4 * KIB
    small_payload_bytes: int = 64 * KIB
    chunk_bytes: int = 256 * KIB
    max_body_bytes: int = 64 * KIB
    max_frame_bytes: int = 256 * MIB
    small_window_bytes: int = MIB
    bulk_window_bytes: int = 16 * MIB
    tcp_user_timeout_s: float = 8.0
    congestion_control: str | None = None
    notsent_lowat_bytes: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.ping_interval_s <= self.dead_after_s / 2:
            raise ValueError(f"ping_interval_s {self.ping_interval_s} must be at most half of {self.dead_after_s=}")
        for name in ("send_deadline_s", "close_timeout_s", "auth_timeout_s", "tcp_user_timeout_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        for name in ("max_pending", "small_payload_bytes", "max_body_bytes", "max_frame_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.preauth_bytes < KIB:
            raise ValueError(f"preauth_bytes {self.preauth_bytes} is too small for the handshake; use 1024 or more")
        if self.chunk_bytes < KIB:
            raise ValueError(f"chunk_bytes {self.chunk_bytes} must be at least 1024")
        for name in ("small_window_bytes", "bulk_window_bytes"):
            if getattr(self, name) < 4 * KIB:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 4096")

    @property
    def max_message_bytes(self) -> int:
        """Largest websocket message either socket may carry: a chunk, or a small frame with its body."""
        return max(self.chunk_bytes, self.small_payload_bytes + self.max_body_bytes) + KIB
