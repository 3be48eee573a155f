"""Half-open ranges of decoder layers, the unit in which everything is placed, held, charged and routed."""

from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True, slots=True, order=True)
class LayerRange:
    """Layers `start <= l < end`; never empty.

    Raises ValueError for a negative start or an empty range.
    """

    start: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end:
            raise ValueError(f"layer range [{self.start}, {self.end}) must satisfy 0 <= start < end")

    def __len__(self) -> int:
        return self.end - self.start

    def __contains__(self, layer: int) -> bool:
        return self.start <= layer < self.end

    def __str__(self) -> str:
        return f"[{self.start}, {self.end})"

    def layers(self) -> range:
        """The layer numbers in order."""
        return range(self.start, self.end)

    def to_pair(self) -> tuple[int, int]:
        """`(start, end)`, as plan files and messages carry it."""
        return (self.start, self.end)

    @classmethod
    def of(cls, pair: tuple[int, int]) -> Self:
        """The range of a `(start, end)` pair."""
        return cls(pair[0], pair[1])
