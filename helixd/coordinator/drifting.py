"""Watches what workers measure at work, and corrects what is planned with when it has drifted.

A node's layer times are believed to be those it was measured with times its slowdown; a link is believed to be what its
`LinkFact` says. On a drift both become what was measured, and whoever plans is told why. When that is so decides
`helixd.coordinator.drift`; what then becomes of the plan, whoever plans.
"""

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from helixd import logs
from helixd.coordinator.drift import Drift, DriftJudge, DriftOptions, Reading
from helixd.coordinator.fleet import Fleet, LinkFact, Node, Slowdown
from helixd.coordinator.probing import ALIKE_RTT_S, HUB, Pair
from helixd.coordinator.suspects import Suspects
from helixd.ids import NodeId, PeerId
from helixd.protocol.codec import to_frame
from helixd.protocol.messages import Measure, NodeStatus, PathSeen
from helixd.protocol.versions import MEASURE_VERSION

log = logging.getLogger(__name__)

MOST_SLOWDOWN = 100.0
EVENTS_KEPT = 32


@dataclass(slots=True)
class DriftEvent:
    """A drift, and what became of it: `decision` is "" until a plan was made with what was measured."""

    subject: str
    sentence: str
    at_s: float
    decision: str = ""


class DriftWatch:
    """The one owner of drift events. `drifted` is told of each; `me` is how workers know the coordinator.

    `planned` says whether a plan in force uses a node, `probe` asks for a link to be measured again.
    """

    def __init__(
        self, fleet: Fleet, options: DriftOptions, me: PeerId, drifted: Callable[[DriftEvent], None],
        planned: Callable[[NodeId], bool], probe: Callable[[Pair], None],
    ) -> None:  # fmt: skip
        self.count = 0
        self.events: deque[DriftEvent] = deque(maxlen=EVENTS_KEPT)
        self._fleet = fleet
        self._judge = DriftJudge(options)
        self._me = me
        self._drifted = drifted
        self._planned = planned
        self._probe = probe
        self._suspects = Suspects()

    def on_status(self, node: Node, status: NodeStatus, now_s: float) -> None:
        """A node tells how it does."""
        self._on_speed(node, status, now_s)
        self._look_again(node, now_s)
        for path in status.paths:
            src, dst = node.peer, PeerId(path.peer)
            self._on_path((HUB, src) if dst == self._me else (src, dst), path, now_s)

    def on_peer_lost(self, peer: PeerId, nodes: Sequence[Node]) -> None:
        """What is known of a life that is over says nothing of the next one."""
        for node in nodes:
            self._judge.forget(node.id)
            self._suspects.drop(node.id)
        for pair in self._fleet.links:
            if peer in pair:
                self._judge.forget(pair)
                self._suspects.drop(pair)

    def off_for_s(self, node: Node, now_s: float) -> float | None:
        """For how long a node has been off what is planned with; None if it is not."""
        return self._judge.off_for_s(node.id, now_s)

    def _on_speed(self, node: Node, status: NodeStatus, now_s: float) -> None:
        readings = []
        if status.prefill_slowdown:
            readings.append(Reading("prefill", _bounded(status.prefill_slowdown), node.slowdown.prefill))
        if status.decode_slowdown:
            readings.append(Reading("decode", _bounded(status.decode_slowdown), node.slowdown.decode))
        drift = self._judge.see(node.id, readings, now_s)
        if drift is None:
            return
        measured = {reading.quantity: reading.measured for reading in readings}
        node.slowdown = Slowdown(
            measured.get("prefill", node.slowdown.prefill), measured.get("decode", node.slowdown.decode)
        )  # fmt: skip
        found = drift.reading
        self._suspects.add(node.id, now_s)
        self._tell(
            node.id, drift, now_s,
            f"{found.quantity} takes {found.measured:.2g} times as long as when it was measured, "
            f"{found.believed:.2g} times was planned with",
        )  # fmt: skip

    def _look_again(self, node: Node, now_s: float) -> None:
        """Have a node measured that a plan may have left out for being slow: it does not show it at work any more."""
        peer = self._fleet.peers.get(node.peer)
        if peer is None or peer.hello.protocol < MEASURE_VERSION or self._planned(node.id):
            return
        if self._suspects.due(node.id, now_s):
            logs.event(log, logging.INFO, "measured_again", node=node.id)
            peer.outbox.post(to_frame(Measure(node.id)))

    def _on_path(self, pair: Pair, path: PathSeen, now_s: float) -> None:
        fact = self._fleet.links.get(pair)
        if fact is None or fact.error:
            return
        if self._suspects.due(pair, now_s):
            self._probe(pair)
        readings = []
        if path.goodput_bytes_per_s:
            readings.append(Reading("bandwidth", path.goodput_bytes_per_s, fact.bandwidth_bytes_per_s))
        if path.rtt_s:
            readings.append(Reading("rtt", max(ALIKE_RTT_S, path.rtt_s), max(ALIKE_RTT_S, fact.rtt_s)))
        drift = self._judge.see(pair, readings, now_s)
        if drift is None:
            return
        found = drift.reading
        self._fleet.links[pair] = _corrected(fact, path)
        self._suspects.add(pair, now_s)
        said = (
            f"carries {found.measured / 1e6:.3g} MB/s, {found.believed / 1e6:.3g} MB/s was planned with"
            if found.quantity == "bandwidth"
            else f"has a round trip of {found.measured * 1e3:.3g} ms, {found.believed * 1e3:.3g} ms was planned with"
        )
        self._tell(" -> ".join(pair), drift, now_s, said)

    def _tell(self, subject: str, drift: Drift, now_s: float, said: str) -> None:
        found = drift.reading
        event = DriftEvent(subject, f"{subject} {said}, for {drift.for_s:.0f} s now", now_s)
        logs.event(
            log, logging.WARNING, "drifted", subject=subject, quantity=found.quantity, measured=found.measured,
            planned_with=found.believed, reason=event.sentence,
        )  # fmt: skip
        self.count += 1
        self.events.append(event)
        self._drifted(event)


def _bounded(slowdown: float) -> float:
    return min(MOST_SLOWDOWN, max(1 / MOST_SLOWDOWN, slowdown))


def _corrected(fact: LinkFact, path: PathSeen) -> LinkFact:
    return replace(
        fact, rtt_s=path.rtt_s or fact.rtt_s,
        bandwidth_bytes_per_s=path.goodput_bytes_per_s or fact.bandwidth_bytes_per_s,
    )  # fmt: skip
