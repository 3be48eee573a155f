"""What one link has carried, for metrics and the cluster page."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LinkCounters:
    """Totals since the link was made. Bytes are message bytes as handed to the carrier, without its framing."""

    frames_sent: int = 0
    frames_received: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    bulk_frames_sent: int = 0
    bulk_frames_received: int = 0


class LinkTally:
    """The mutable owner behind a LinkCounters snapshot."""

    __slots__ = (
        "bulk_frames_received",
        "bulk_frames_sent",
        "bytes_received",
        "bytes_sent",
        "frames_received",
        "frames_sent",
    )

    def __init__(self) -> None:
        self.frames_sent = 0
        self.frames_received = 0
        self.bytes_sent = 0
        self.bytes_received = 0
        self.bulk_frames_sent = 0
        self.bulk_frames_received = 0

    def snapshot(self) -> LinkCounters:
        """The totals as they are now."""
        return LinkCounters(
            frames_sent=self.frames_sent,
            frames_received=self.frames_received,
            bytes_sent=self.bytes_sent,
            bytes_received=self.bytes_received,
            bulk_frames_sent=self.bulk_frames_sent,
            bulk_frames_received=self.bulk_frames_received,
        )
