"""One step of a node, run in the node's dedicated thread: closes, opens, one forward pass, results packed as bytes.

Turns passes (bytes) into the engine's tensors and the engine's results into payloads per next hop. Knows no sockets.
"""

from collections.abc import Sequence

import torch

from helixd.engine.engine import Engine
from helixd.engine.loader import TORCH_DTYPES
from helixd.engine.types import StageResult, StageWork
from helixd.errors import OutOfKv
from helixd.ids import SequenceId
from helixd.model.decoder import DType
from helixd.worker.batcher import Pass
from helixd.worker.steps import DrawnToken, ScoredPass, Step, StepOutcome


class NodeCompute:
    """An engine and how bytes become its tensors. Every method runs in the node's thread."""

    def __init__(self, engine: Engine, hidden_size: int, dtype: DType) -> None:
        self.engine = engine
        self._hidden_size = hidden_size
        self._dtype = TORCH_DTYPES[dtype]
        self.row_bytes = hidden_size * self._dtype.itemsize

    def run(self, step: Step) -> StepOutcome:
        """Do the step. A pass that finds no KV room, or that makes no sense, is set aside; the rest goes on."""
        outcome = StepOutcome()
        for handle in step.closes:
            self.engine.close(handle)
        refused: dict[SequenceId, str] = {}
        for spec in step.opens:
            try:
                self.engine.open(spec)
            except ValueError as error:
                refused[spec.id] = str(error)
        passes: list[ScoredPass] = []
        for scored in step.passes:
            if scored.item.handle in refused:
                outcome.failed.append((scored.item, refused[scored.item.handle]))
            else:
                passes.append(scored)
        groups = dict(zip((p.item.handle for p in step.passes), step.groups, strict=True))
        self._forward(passes, groups, outcome)
        return outcome

    def _forward(self, passes: list[ScoredPass], groups: dict[SequenceId, str], outcome: StepOutcome) -> None:
        while passes:
            try:
                results = self.engine.forward([self._work(scored, groups) for scored in passes])
            except OutOfKv as error:
                victim = _victim(error, passes)
                outcome.out_of_kv.append(victim.item)
                passes.remove(victim)
                continue
            except ValueError as error:
                # Nothing has been computed: whoever sent nonsense is found by running each alone.
                if len(passes) == 1:
                    outcome.failed.append((passes[0].item, str(error)))
                else:
                    for scored in passes:
                        self._forward([scored], groups, outcome)
                return
            except RuntimeError as error:
                # torch reports device trouble (out of memory, a lost device) as RuntimeError: these sequences can go
                # on elsewhere, and the next step tells whether the device still works.
                why = f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"
                outcome.failed.extend((scored.item, why) for scored in passes)
                return
            self._pack(passes, results, groups, outcome)
            outcome.layers_s += self.engine.layers_s
            return

    def _work(self, scored: ScoredPass, groups: dict[SequenceId, str]) -> StageWork:
        item = scored.item
        hidden = None
        if item.rows is not None:
            hidden = torch.frombuffer(item.rows, dtype=self._dtype).view(item.n, self._hidden_size)
        last = not groups[item.handle]
        return StageWork(item.handle, item.start, item.token_ids, hidden, item.sample and last, scored.score)

    def _pack(
        self, passes: list[ScoredPass], results: Sequence[StageResult], groups: dict[SequenceId, str], into: StepOutcome
    ) -> None:
        onward: dict[str, tuple[list[Pass], list[torch.Tensor]]] = {}
        for scored, result in zip(passes, results, strict=True):
            item = scored.item
            if result.hidden is not None:
                items, tensors = onward.setdefault(groups[item.handle], ([], []))
                items.append(item)
                tensors.append(result.hidden)
            if result.token is not None:
                into.drawn.append(DrawnToken(item, result.token, result.logprobs))
            if result.scores is not None:
                into.scored.append((item, result.scores))
        for group, (items, tensors) in onward.items():
            stacked = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
            into.rows.append((group, items, _bytes_of(stacked)))


def _bytes_of(rows: torch.Tensor) -> memoryview:
    """The rows' memory, copied off the engine's buffers and the device."""
    owned = rows.detach().to("cpu", copy=True).contiguous()
    return memoryview(owned.view(torch.uint8).numpy().data).cast("B")


def _victim(error: OutOfKv, passes: list[ScoredPass]) -> ScoredPass:
    """The pass that did not fit: the one the engine names, else the one with most rows."""
    for scored in passes:
        if scored.item.handle == error.sequence:
            return scored
    return max(passes, key=lambda scored: scored.item.n)
