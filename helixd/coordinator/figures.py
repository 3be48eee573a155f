"""The coordinator's own figures for Prometheus: what it carries between workers that nothing links, and its disk."""

from collections.abc import Callable, Iterator

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from helixd.coordinator.coordinator import Coordinator


class CoordinatorFigures(Collector):
    """Read when they are asked for. Labels: none; `/cluster` names the pairs.

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
            "helixd_state_write_errors", "Writes that the state directory did not take", self._state_write_errors()
        )
