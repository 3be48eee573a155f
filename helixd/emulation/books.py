"""The books of an emulated node: which layers it holds, which sequences take how much KV. Computes nothing."""

from collections.abc import Callable
from dataclasses import dataclass

from helixd.engine.types import SequenceSpec
from helixd.ids import SequenceId
from helixd.layers import LayerRange
from helixd.model.weights import WeightSource


@dataclass(slots=True)
class _Held:
    spec: SequenceSpec
    tokens: int = 0


class EmulatedEngine:
    """A `StageEngine` without weights. KV is charged for the layers used, times tokens, to the token."""

    def __init__(self) -> None:
        self._layers: set[int] = set()
        self._sequences: dict[SequenceId, _Held] = {}
        self._capacity = 0
        self._used = 0

    @property
    def loaded(self) -> frozenset[int]:
        """The layers held."""
        return frozenset(self._layers)

    @property
    def kv_capacity_token_layers(self) -> int:
        """The hard limit."""
        return self._capacity

    @property
    def kv_used_token_layers(self) -> int:
        """What open sequences hold."""
        return self._used

    @property
    def kv_pages_used(self) -> int:
        """The same: a page is one token of one layer here."""
        return self._used

    def set_kv_capacity(self, token_layers: int) -> None:
        """Change the hard limit; what sequences hold stays."""
        self._capacity = token_layers

    def load(
        self, layers: LayerRange, source: WeightSource, *, embedding: bool, head: bool,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:  # fmt: skip
        """Hold `layers` too, at once."""
        self._layers.update(layers.layers())
        if progress is not None:
            progress(len(layers), len(layers))

    def unload(self, layers: LayerRange) -> None:
        """Drop these layers."""
        self._layers.difference_update(layers.layers())

    def open(self, spec: SequenceSpec) -> None:
        """Start a sequence without KV. Raises ValueError if its layers are not held here."""
        if not self._layers.issuperset(spec.layers.layers()):
            raise ValueError(f"sequence {spec.id} wants layers {spec.layers}, held are {sorted(self._layers)}")
        self._sequences[spec.id] = _Held(spec)

    def close(self, sequence: SequenceId) -> None:
        """Forget a sequence and free its KV. Unknown ones are ignored."""
        held = self._sequences.pop(sequence, None)
        if held is not None:
            self._used -= held.tokens * len(held.spec.layers)

    def spec(self, sequence: SequenceId) -> SequenceSpec:
        """What an open sequence was opened with. Raises KeyError."""
        return self._sequences[sequence].spec

    def extend(self, sequence: SequenceId, start: int, count: int) -> bool:
        """KV for positions `[start, start + count)`, forgetting what was after `start`; False if there is no room.

        Raises ValueError for a sequence that is not open or a gap in its positions.
        """
        held = self._sequences.get(sequence)
        if held is None:
            raise ValueError(f"sequence {sequence} is not open")
        if start > held.tokens:
            raise ValueError(f"sequence {sequence}: work starts at {start}, its KV ends at {held.tokens}")
        more = (start + count - held.tokens) * len(held.spec.layers)
        if self._used + more > self._capacity:
            return False
        self._used += more
        held.tokens = start + count
        return True
