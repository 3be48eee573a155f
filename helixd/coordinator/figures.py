"""The coordinator's own figures for Prometheus: what it relays, how nodes do against what was measured, its disk."""

from collections.abc import Callable, Iterator

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from helixd.coordinator.coordinator import Coordinator


class CoordinatorFigures(Collector):
    """Read when they are asked for. Labels: node ids and kinds of work; `/cluster` names the pairs that are relayed.

    `state_write_errors`: how often the state directory did not take what should be remembered.
    """

    def __init__(self, coordinator: Coordinator, state_write_errors: Callable[[], int] = lambda: 0) -> None:
        self._coordinator = coordinator
        self._state_write_errors = state_write_errors

    def collect(self) -> Iterator[Metric]:
        """All of them, as they are now."""
        active, relay = self._coordinator.epochs.active, self._coordinator.relay
        yield GaugeMetricFamily(
            "helixd_relayed_pairs", "Pairs of workers whose rows pass through the coordinator",
            0 if active is None else len(active.relayed),
        )  # fmt: skip
        yield CounterMetricFamily("helixd_relayed_frames", "Messages passed on between workers", relay.carried_frames)
        yield CounterMetricFamily("helixd_relayed_bytes", "Bytes of rows passed on", relay.carried_bytes)
        yield CounterMetricFamily(
            "helixd_relay_dropped_frames", "Messages that could not be passed on", relay.dropped_frames
        )
        yield CounterMetricFamily(
            "helixd_drifts", "Nodes and links found to differ for long from what was planned with",
            self._coordinator.drift.count,
        )  # fmt: skip
        measured = GaugeMetricFamily(
            "helixd_node_slowdown", "Times of steps over those measured before any placement", labels=["node", "kind"]
        )
        planned = GaugeMetricFamily(
            "helixd_node_slowdown_planned", "The slowdown of a node that is planned with", labels=["node", "kind"]
        )
        for node in self._coordinator.fleet.nodes.values():
            status = node.status
            seen = (0.0, 0.0) if status is None else (status.prefill_slowdown, status.decode_slowdown)
            for kind, found, believed in zip(("prefill", "decode"), seen, node.slowdown, strict=True):
                planned.add_metric([node.id, kind], believed)
                if found:
                    measured.add_metric([node.id, kind], found)
        yield measured
        yield planned
        yield CounterMetricFamily(
            "helixd_state_write_errors", "Writes that the state directory did not take", self._state_write_errors()
        )
