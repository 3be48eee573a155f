"""One request in the simulated world."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from helixd.sim.wires import Wire


@dataclass(frozen=True, slots=True)
class Request:
    """What a client asks: a prompt of `input_tokens`, then `output_tokens` decode passes."""

    input_tokens: int
    output_tokens: int


@dataclass(eq=False, slots=True)
class Job:
    """A request on its way: one life of it; recovering starts another.

    `rows` is what its pass under way computes: prompt tokens, or 0 for a decode pass. `wires` are its route's links
    from the coordinator and back to it, `hop` the one it took last. `emitted`: decode passes that came back.
    `feedback`: the wire on which the last stage hands a token straight to the first, `drawn` how many it has drawn.
    """

    number: int
    request: Request
    created_s: float
    rows: int
    emitted: int = 0
    hop: int = 0
    wires: "list[Wire]" = field(default_factory=list)
    sent_s: float = 0.0
    first_s: float = -1.0
    alive: bool = True
    arrived_rows: int = 0
    attempt: int = 0
    feedback: "Wire | None" = None
    drawn: int = 0

    @property
    def tokens(self) -> int:
        """Tokens whose KV is kept once the pass under way is done."""
        return self.request.input_tokens + self.emitted
