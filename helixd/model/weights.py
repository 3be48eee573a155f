"""Where a decoder's weights come from: named raw tensors, read one at a time into owned memory.

The names are the checkpoint's own. Which of them make up a layer is `helixd.model.names`' business; turning them
into device tensors is the engine's. No torch here: a tensor is its dtype's name, its shape and its bytes.
"""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class RawTensor:
    """One tensor in owned, writable memory (never a live mmap: a file rewritten under one kills the process)."""

    dtype: str
    shape: tuple[int, ...]
    data: bytearray


class WeightSource(Protocol):
    """Reads tensors by checkpoint name. Blocking: call it off the event loop."""

    def read(self, name: str) -> RawTensor:
        """The tensor called `name`. Raises ModelError naming a tensor that is missing, truncated or of a bad dtype."""
        ...

    def __contains__(self, name: str) -> bool:
        """Whether the checkpoint has a tensor of that name."""
        ...
