"""What nodes and wires did between two moments: utilisation, batches, KV, and where a decode pass's time goes."""

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

from helixd.ids import NodeId
from helixd.sim.meter import NodeReport
from helixd.sim.wires import Wire
from helixd.sim.world import World

SAMPLE_S = 1.0


class Counts(Protocol):
    """A node's running totals."""

    id: NodeId
    busy_s: float
    prompt_s: float
    batches: int
    decodes: int
    decode_pass_s: float


class Tally:
    """Starts counting at `begin`; samples KV (`fill_of`: the share of a node's room that is taken) once a second."""

    def __init__(
        self, world: World, nodes: Iterable[Counts], wires: Iterable[Wire], fill_of: Callable[[NodeId], float]
    ) -> None:
        self._world = world
        self._nodes = tuple(nodes)
        self._wires = tuple(wires)
        self._fill_of = fill_of
        self._before: dict[NodeId, tuple[float, float, int, int, float]] = {}
        self._passes: list[int] = []
        self._began_s = 0.0
        self._fill: dict[NodeId, float] = {}
        self._peak: dict[NodeId, float] = {}
        self._samples = 0

    def begin(self) -> None:
        """The window starts now."""
        self._began_s = self._world.now_s
        self._before = {
            node.id: (node.busy_s, node.prompt_s, node.batches, node.decodes, node.decode_pass_s)
            for node in self._nodes
        }
        self._passes = [wire.passes for wire in self._wires]
        self._sample(None)

    def nodes(self) -> dict[NodeId, NodeReport]:
        """Each node since the window began."""
        window_s = max(1e-9, self._world.now_s - self._began_s)
        found: dict[NodeId, NodeReport] = {}
        for node in self._nodes:
            busy_s, prompt_s, batches, decodes, _ = self._before[node.id]
            batches = node.batches - batches
            found[node.id] = NodeReport(
                min(1.0, (node.busy_s - busy_s) / window_s), min(1.0, (node.prompt_s - prompt_s) / window_s),
                batches, (node.decodes - decodes) / max(1, batches),
                self._fill.get(node.id, 0.0) / max(1, self._samples), self._peak.get(node.id, 0.0),
            )  # fmt: skip
        return found

    def round_s(self, passes: int, mean_s: float) -> Mapping[str, float]:
        """Where the mean decode pass (of `passes`, `mean_s` long) spent its time: in batches, on wires, waiting."""
        if not passes:
            return {}
        compute_s = sum(node.decode_pass_s - self._before[node.id][4] for node in self._nodes) / passes
        network_s = sum(
            (wire.passes - before) * (wire.row_s + wire.latency_s)
            for wire, before in zip(self._wires, self._passes, strict=True)
        )
        network_s /= passes
        return {"compute": compute_s, "network": network_s, "waiting": max(0.0, mean_s - compute_s - network_s)}

    def _sample(self, _: None) -> None:
        self._samples += 1
        for node in self._nodes:
            fill = self._fill_of(node.id)
            self._fill[node.id] = self._fill.get(node.id, 0.0) + fill
            self._peak[node.id] = max(self._peak.get(node.id, 0.0), fill)
        self._world.at(self._world.now_s + SAMPLE_S, self._sample)
