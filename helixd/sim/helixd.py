"""Policy `helixd`: what our coordinator and workers do, with the real router, ledger, admission and expectation.

Whole-range stages, decode first, prefill in chunks; KV reserved by expectation and preempted by recompute; a queue in
front of prefill. A request is one prompt pass and `output_tokens` decode passes, as in the paper's simulator.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from helixd.errors import NoRoute
from helixd.ids import Attempt, NodeId, SequenceId
from helixd.plan.cluster.spec import COORDINATOR, ClusterSpec
from helixd.plan.plan import Plan
from helixd.route.admission import AdmissionQueue
from helixd.route.choosers import FixedRoundRobin, FlowShares, HopChooser, RandomHop, ShortestQueue, Swarm
from helixd.route.expectation import OutputLength
from helixd.route.ledger import KvLedger
from helixd.route.router import PREFILL_LIMIT_TOKENS, SLACK_TOKENS, Route, Router
from helixd.sim.job import Job, Request
from helixd.sim.load import Lengths, Load, Offline
from helixd.sim.meter import Meter, Report
from helixd.sim.script import DETECTED_S, Happening, Progress, SimulationStopped
from helixd.sim.stage_node import StageNode, StepLimits
from helixd.sim.tally import Tally
from helixd.sim.times import LayerTimes
from helixd.sim.wires import Edge, make_wires
from helixd.sim.world import World, run_window

CHOOSERS = ("flow", "flow-alone", "flow-by-queue", "swarm", "random", "shortest-queue", "round-robin")
BACKLOG = 4
COUNTED_TOGETHER = 16
"""Decode steps are told to the router in lots: the same sum in a sixteenth of the time."""
KV_PAGE_TOKENS = 64
"""As workers give KV out."""
_EVERYBODY = 1 << 30
_LIMITS = StepLimits()


@dataclass(frozen=True, slots=True)
class HelixdPolicy:
    """The engine's and the coordinator's options. `chooser` is one of CHOOSERS: "flow" is what the coordinator does,
    "flow-alone" draws by shares of flow alone, "flow-by-queue" goes by queues as measured; the rest are baselines.

    `feedback`: the last stage sends the token to the first directly where there is a link, not by the coordinator.
    `decode_first`: decode passes overtake prefill on links. `kv_page_tokens`: KV is given out in pages of so many
    tokens. `lengths_announced`: clients ask for as many tokens as they get, not for more; the ledger goes by that.
    `frames`: the decode passes of a step that go the same way travel and arrive as one message, as our workers send
    them; False makes each a message of its own, as the paper's simulator has it, and wakes an idle node by itself.
    """

    limits: StepLimits = _LIMITS
    kv_mark: float = 0.95
    prefill_tokens: int | None = PREFILL_LIMIT_TOKENS
    decode_first: bool = True
    feedback: bool = False
    chooser: str = "flow"
    kv_page_tokens: int = KV_PAGE_TOKENS
    lengths_announced: bool = False
    frames: bool = True

    @property
    def name(self) -> str:
        """For tables."""
        return "helixd" if self.chooser == "flow" else f"helixd/{self.chooser}"

    def run(
        self, spec: ClusterSpec, plan: Plan, load: Load, lengths: Lengths, *, seed: int = 0,
        script: Sequence[Happening] = (), progress: Progress | None = None,
    ) -> Report:  # fmt: skip
        """Simulate. Raises SimulationStopped where no request fits, ValueError for an unknown chooser."""
        if self.chooser not in CHOOSERS:
            raise ValueError(f"chooser {self.chooser!r} is none of {', '.join(CHOOSERS)}")
        return Simulation(self, spec, plan, load, lengths, seed, script).report(progress)


class Simulation:
    """One run. Tests look inside; others call `HelixdPolicy.run`."""

    def __init__(
        self, policy: HelixdPolicy, spec: ClusterSpec, plan: Plan, load: Load, lengths: Lengths, seed: int,
        script: Sequence[Happening] = (),
    ) -> None:  # fmt: skip
        self.world = world = World()
        self.policy, self.load, self.lengths, self.seed = policy, load, lengths, seed
        self.requests = lengths.draws(seed)
        self.longest_output = max(output for _, output in lengths.pairs)
        self.count = 0
        self.queue: AdmissionQueue[Job] = AdmissionQueue(_EVERYBODY)
        self.flying: dict[SequenceId, tuple[Job, Route]] = {}
        self.masked: set[NodeId] = set()
        self.expect = OutputLength(spec.workload.mean_output_tokens)
        self.meter = Meter(load.warmup_s, load.warmup_s + load.measure_s)
        placement = plan.placement
        held = {node.id: (node, placement[node.id]) for node in spec.nodes if node.id in placement}
        self.nodes = {
            name: StageNode(
                world, name, layers, LayerTimes(node.profile), policy.limits, spec.model.activation_bytes
            )
            for name, (node, layers) in held.items()
        }  # fmt: skip
        bandwidth = {(link.src, link.dst): link.bandwidth_bytes_per_s for link in spec.links}
        edges = [(src, hop.node) for src, hops in plan.schedule.items() for hop in hops]
        entries = {edge: 0 if edge[0] == COORDINATOR else placement[edge[0]].end for edge in edges}
        rates = {edge: bandwidth[edge] for edge in edges}
        self.wires = make_wires(
            world, spec, rates, entries, decode_first=policy.decode_first, frames=policy.frames
        )  # fmt: skip
        for (_, dst), wire in self.wires.items():
            if dst == COORDINATOR:
                wire.deliver = self._token
            else:
                self.nodes[dst].connect(wire)
        self.feedback = make_wires(
            world, spec, _feedback_rates(plan, bandwidth) if policy.feedback else {}, {}, frames=policy.frames
        )  # fmt: skip
        for (_, dst), wire in self.feedback.items():
            wire.row_s *= spec.model.token_bytes / spec.model.activation_bytes
            self.nodes[dst].connect(wire)
        room = plan.kv_capacity_token_layers or {
            name: node.profile.kv_capacity_token_layers[len(layers) - 1] for name, (node, layers) in held.items()
        }
        ledger = KvLedger({}, high_water=policy.kv_mark, page_tokens=policy.kv_page_tokens)
        self.router = Router(
            plan, {node: int(size) for node, size in room.items()}, ledger=ledger,
            chooser=self._chooser(plan, ledger), prefill_limit_tokens=policy.prefill_tokens,
        )  # fmt: skip
        wires = [*self.wires.values(), *self.feedback.values()]
        self.tally = Tally(world, self.nodes.values(), wires, self.router.ledger.fill)
        for happening in script:
            world.at(happening.at_s, self._fails if happening.what == "fails" else self._joins, happening.node)

    def report(self, progress: Progress | None = None) -> Report:
        """Run to the end and sum up."""
        if isinstance(self.load, Offline):
            self._see_that_some_fit()
            self._admit()
        else:
            self._next_arrival(self.load.arrivals(self.lengths, self.seed))
        run_window(self.world, self.meter.start_s, self.meter.end_s, self.tally.begin, progress)
        return self.meter.report(self.policy.name, self.tally, self.world.events)

    def _chooser(self, plan: Plan, ledger: KvLedger) -> HopChooser | None:
        match self.policy.chooser:
            case "flow-alone":
                return FlowShares(plan.schedule, COORDINATOR)
            case "flow-by-queue":
                return FlowShares(
                    plan.schedule, COORDINATOR, slack_tokens=SLACK_TOKENS, fill_of=ledger.fill,
                    queue_of=lambda node: self.nodes[node].queued_rows(),
                )  # fmt: skip
            case "swarm":
                return Swarm()
            case "random":
                return RandomHop(self.seed)
            case "shortest-queue":
                return ShortestQueue(
                    lambda node: self.nodes[node].queue_length() if node != COORDINATOR else 0.0, self.seed
                )
            case "round-robin":
                return FixedRoundRobin()
        return None

    # -- arrivals and admission --------------------------------------------------------------------------------------

    def _next_arrival(self, arrivals: Iterator[tuple[float, Request]]) -> None:
        found = next(arrivals, None)
        if found is not None:
            self.world.at(found[0], self._arrived, (found[1], arrivals))

    def _arrived(self, argument: tuple[Request, Iterator[tuple[float, Request]]]) -> None:
        request, arrivals = argument
        self._push(request)
        self._admit()
        self._next_arrival(arrivals)

    def _see_that_some_fit(self) -> None:
        """Else there would be a next request for ever, and every one dropped at once."""
        shortest = min(prompt for prompt, _ in self.lengths.pairs)
        if not self.router.fits_when_empty(shortest):
            raise SimulationStopped(
                f"no request fits: the KV cache of every pipeline is too small for a prompt of {shortest} tokens, the "
                "shortest here, even when it is empty; fewer layers on the tightest nodes leave more room"
            )

    def _push(self, request: Request) -> None:
        now_s = self.world.now_s
        self.count += 1
        if not self.router.fits_when_empty(request.input_tokens):
            self.meter.dropped += 1
            return
        self.queue.push(Job(self.count, request, now_s, request.input_tokens), now_s=now_s)
        self.meter.queued(now_s, +1)

    def _admit(self) -> None:
        """Let in whom there is room for. Offline there is always a next request, given a client that is free."""
        offline = isinstance(self.load, Offline)
        clients = self.load.in_flight if isinstance(self.load, Offline) else None
        while offline or len(self.queue):
            while offline and len(self.queue) < (BACKLOG if clients is None else clients - len(self.flying)):
                self._push(next(self.requests))
            admitted = self.queue.admit(self.world.now_s, self._try)
            self.meter.queued(self.world.now_s, -len(admitted))
            if not admitted:
                return

    def _try(self, job: Job) -> bool:
        sequence, attempt = SequenceId(job.number), Attempt(job.attempt)
        longest = job.request.output_tokens + 1 if self.policy.lengths_announced else self.longest_output
        expected = self.expect.expect(longest, emitted=job.emitted)
        page = self.policy.kv_page_tokens
        reserved = -(-(job.rows + expected) // page) * page
        try:
            route = self.router.draw(sequence, job.rows, reserved - job.rows, attempt=attempt, masked_nodes=self.masked)
        except NoRoute:
            return False
        now_s = self.world.now_s
        self.flying[sequence] = job, route
        self.meter.started += job.attempt == 0
        self.meter.flying(now_s, +1)
        if self.policy.feedback:
            job.feedback = self.feedback.get((route.nodes[-1], route.nodes[0]))
            job.drawn = job.emitted
        job.wires = [self.wires[link] for link in route.links]
        job.hop = 0
        job.sent_s = now_s
        job.wires[0].send(job, job.rows)
        return True

    # -- tokens ------------------------------------------------------------------------------------------------------

    def _token(self, job: Job) -> None:
        if not job.alive:
            return
        now_s = self.world.now_s
        sequence, attempt = SequenceId(job.number), Attempt(job.attempt)
        prefilled = job.rows > 0
        if prefilled:
            if job.attempt == 0:
                job.first_s = now_s
                self.meter.prompted(now_s, now_s - job.created_s, job.rows)
            else:
                # Prompt and emitted tokens were computed again, and the next token with them.
                job.emitted += 1
            job.rows = 0
            self.router.prefilled(sequence, attempt)
        else:
            job.emitted += 1
            self.meter.decoded(now_s, now_s - job.sent_s)
        if job.emitted >= job.request.output_tokens:
            self.meter.done(now_s, job.created_s, job.first_s, job.emitted)
            self.expect.observe(job.emitted)
            self._end(job)
            self._admit()
            return
        if job.emitted % COUNTED_TOGETHER == 0:
            self.router.count_decode(self.flying[sequence][1], COUNTED_TOGETHER)
        job.sent_s = now_s
        if job.feedback is None:
            job.hop = 0
            job.wires[0].send(job, 0)
        relieved = [self._relieve(node) for node in self.router.ledger.grow(sequence, job.tokens + 1, attempt=attempt)]
        if prefilled or any(relieved):
            self._admit()

    def _end(self, job: Job) -> None:
        """A life of a sequence ends: it is finished, or begins again."""
        sequence = SequenceId(job.number)
        job.alive = False
        del self.flying[sequence]
        self.router.release(sequence)
        self.meter.flying(self.world.now_s, -1)

    def _relieve(self, node: NodeId) -> bool:
        """The youngest sequence on an overfull node begins again, unless it is the only one there."""
        ledger = self.router.ledger
        here = ledger.holders(node)
        if node not in ledger.over() or len(here) < 2:
            return False
        self.meter.preempted += 1
        self._begin_again(self.flying[max(sequence for sequence, _ in here)][0])
        return True

    def _begin_again(self, job: Job) -> None:
        self._end(job)
        again = Job(
            job.number, job.request, job.created_s, job.request.input_tokens + job.emitted, job.emitted,
            first_s=job.first_s, attempt=job.attempt + 1,
        )  # fmt: skip
        if job.first_s < 0:
            again.rows = job.request.input_tokens
        self.queue.push(again, now_s=self.world.now_s, priority=_EVERYBODY - job.number)
        self.meter.queued(self.world.now_s, +1)

    # -- happenings --------------------------------------------------------------------------------------------------

    def _fails(self, node: NodeId) -> None:
        self.nodes[node].forget_everything()
        self.world.at(self.world.now_s + DETECTED_S, self._is_lost, node)

    def _is_lost(self, node: NodeId) -> None:
        """The coordinator has noticed: nobody goes there, who was there begins again elsewhere."""
        self.masked.add(node)
        for job, route in list(self.flying.values()):
            if node in route.nodes:
                self.meter.recovered += 1
                self._begin_again(job)
        self.router.ledger.forget_node(node)
        self._admit()

    def _joins(self, node: NodeId) -> None:
        self.masked.discard(node)
        self.nodes[node].come_back()
        self._admit()


def _feedback_rates(plan: Plan, bandwidth: Mapping[Edge, float]) -> dict[Edge, float]:
    """Links from nodes that hold the last layer to nodes that hold the first."""
    first = [hop.node for hop in plan.schedule[COORDINATOR]]
    last = [node for node, hops in plan.schedule.items() if any(hop.node == COORDINATOR for hop in hops)]
    return {(a, b): bandwidth[a, b] for a in last for b in first if bandwidth.get((a, b), 0.0) > 0}
