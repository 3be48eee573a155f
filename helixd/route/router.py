"""Routes: a walk over a plan's schedules from source to sink, in proportion to flow, under masks and KV room.

Decides which pipeline a sequence takes and what KV it reserves there. Knows no sockets and no requests; who is dead,
draining or unreachable comes in as masks. The coordinator and the simulator run exactly this code.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

from helixd.errors import NoRoute
from helixd.ids import Attempt, NodeId, SequenceId
from helixd.layers import LayerRange
from helixd.plan.cluster.spec import COORDINATOR
from helixd.plan.plan import Plan
from helixd.route.choosers import FlowShares, HopChooser
from helixd.route.ledger import KvLedger

Link = tuple[NodeId, NodeId]
_FIRST = Attempt(0)

SLACK_TOKENS = 4_000.0
"""How far, in tokens, a hop may be ahead of its share of flow for the sake of a shorter wait: a few prompts. With much
more, what is fast gets everything, and next tokens wait there for the prompts."""

PREFILL_LIMIT_TOKENS = 16_384
"""More prompts in prefill at once than this serve nobody sooner: every stage of the pipelines has its chunk by then."""


@dataclass(frozen=True, slots=True)
class RouteHop:
    """One stage of a route: `node` computes `layers`, from where the hop before it ended to its own range's end."""

    node: NodeId
    layers: LayerRange

    def __str__(self) -> str:
        return f"{self.node}{self.layers}"


@dataclass(frozen=True, slots=True)
class Route:
    """A sequence's hops in order; together they are every layer once."""

    hops: tuple[RouteHop, ...]
    links: tuple[Link, ...] = field(init=False, repr=False, compare=False)
    """The links in order, from the coordinator and back to it."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "links", tuple(pairwise((COORDINATOR, *self.nodes, COORDINATOR))))

    @property
    def nodes(self) -> tuple[NodeId, ...]:
        """The nodes in order."""
        return tuple(hop.node for hop in self.hops)

    def __str__(self) -> str:
        return " -> ".join(str(hop) for hop in self.hops)


class Router:
    """Draws routes of one plan. The ledger may outlive the router: hand it on when the plan changes.

    `kv_capacity_token_layers` is each node's room, as the worker offers it, in tokens x layers. `chooser` decides
    among admissible hops; left out, in proportion to the plan's flow. `prefill_limit_tokens`: how many prompt tokens
    may be in prefill at once; other prompts wait in line, where they hold no KV and may still go elsewhere.
    """

    def __init__(
        self,
        plan: Plan,
        kv_capacity_token_layers: Mapping[NodeId, int],
        *,
        high_water: float = 0.95,
        ledger: KvLedger | None = None,
        chooser: HopChooser | None = None,
        prefill_limit_tokens: int | None = PREFILL_LIMIT_TOKENS,
    ) -> None:
        self.plan = plan
        self.ledger = ledger if ledger is not None else KvLedger({}, high_water=high_water)
        for node, room in kv_capacity_token_layers.items():
            self.ledger.set_capacity(node, room)
        self._next = {vertex: tuple(hop.node for hop in hops) for vertex, hops in plan.schedule.items()}
        self._chooser: HopChooser = chooser or FlowShares(
            plan.schedule, COORDINATOR, slack_tokens=SLACK_TOKENS, fill_of=self.ledger.fill
        )
        self._prefilling: dict[tuple[SequenceId, Attempt], tuple[Route, int]] = {}
        self._prefill_tokens = 0
        self._prefill_limit_tokens = prefill_limit_tokens

    @property
    def prefill_tokens(self) -> int:
        """Prompt tokens that are in prefill now, on all routes."""
        return self._prefill_tokens

    def draw(
        self,
        sequence: SequenceId,
        prompt_tokens: int,
        expected_tokens: int,
        *,
        attempt: Attempt = _FIRST,
        masked_nodes: Collection[NodeId] = frozenset(),
        masked_links: Collection[Link] = frozenset(),
    ) -> Route:
        """A route for a sequence of `prompt_tokens` (all that is to be prefilled) and about `expected_tokens` more.

        Its KV is reserved on every hop. Every admissible path can be found: no walk ends in a dead end. Raises NoRoute
        with cause "kv" (KV or prefill is full now, waiting helps) or "topology" (masked, cut off, or larger than any
        path's KV room); nothing is reserved then.
        """
        tokens = prompt_tokens + expected_tokens
        limit = self._prefill_limit_tokens
        if limit is not None and self._prefill_tokens and self._prefill_tokens + prompt_tokens > limit:
            raise NoRoute(f"{self._prefill_tokens} prompt tokens are being computed already", cause="kv")
        walk = _Walk(self, prompt_tokens, tokens, frozenset(masked_nodes), frozenset(masked_links))
        if not walk.open_from(COORDINATOR):
            raise self._no_route(walk, prompt_tokens)
        hops: list[RouteHop] = []
        charged: list[tuple[NodeId, NodeId, tuple[NodeId, ...]]] = []
        vertex, entry = COORDINATOR, 0
        while True:
            allowed = walk.ways(vertex)
            chosen = self._chooser.choose(vertex, allowed, max(1, prompt_tokens))
            charged.append((vertex, chosen, allowed))
            if chosen == COORDINATOR:
                break
            end = self.plan.placement[chosen].end
            hops.append(RouteHop(chosen, LayerRange(entry, end)))
            vertex, entry = chosen, end
        for hop in hops:
            self.ledger.reserve(
                sequence, hop.node, len(hop.layers), walk.tokens_at(hop.node, len(hop.layers)), attempt=attempt
            )
        for vertex, chosen, allowed in charged:
            self._chooser.charge(vertex, chosen, allowed, max(1, prompt_tokens))
        route = Route(tuple(hops))
        self._prefilling[sequence, attempt] = route, max(1, prompt_tokens)
        self._prefill_tokens += max(1, prompt_tokens)
        return route

    def prefilled(self, sequence: SequenceId, attempt: Attempt = _FIRST) -> None:
        """An attempt's prompt has been computed (or never will be): nobody waits behind it now. Safe to repeat."""
        found = self._prefilling.pop((sequence, attempt), None)
        if found is not None:
            route, cost = found
            self._prefill_tokens -= cost
            for node in route.nodes:
                self._chooser.prefilled(node, cost)

    def count_decode(self, route: Route, tokens: int = 1) -> None:
        """Decode steps load a route too: account `tokens` of them, so that later draws go where there is less."""
        follow, next_hops = self._chooser.follow, self._next
        for src, dst in route.links:
            everybody = next_hops.get(src, ())
            # A route of an earlier plan may use hops that this one does not have.
            if dst in everybody:
                follow(src, dst, everybody, tokens)

    def release(self, sequence: SequenceId, node: NodeId | None = None, *, attempt: Attempt | None = None) -> int:
        """Give back the KV of a sequence on `node`, or everywhere; how many tokens x layers. Safe to repeat."""
        for waiting in [key for key in self._prefilling if key[0] == sequence and attempt in (None, key[1])]:
            self.prefilled(*waiting)
        if node is None:
            return self.ledger.release_everywhere(sequence, attempt=attempt)
        return self.ledger.release(sequence, node, attempt=attempt)

    def has_pipeline(
        self, masked_nodes: Collection[NodeId] = frozenset(), masked_links: Collection[Link] = frozenset()
    ) -> bool:
        """Whether some path is left under these masks, KV aside."""
        return _Walk(self, 0, 0, frozenset(masked_nodes), frozenset(masked_links), kv="ignored").open_from(COORDINATOR)

    def fits_when_empty(self, prompt_tokens: int) -> bool:
        """Whether a prompt of this length fits into the KV room of some path, were nobody else there."""
        return _Walk(
            self, prompt_tokens, prompt_tokens + 1, frozenset(), frozenset(), kv="empty"
        ).open_from(COORDINATOR)  # fmt: skip

    def next_hops(self, vertex: NodeId) -> tuple[NodeId, ...]:
        """Where the schedule lets a sequence go from `vertex`; `COORDINATOR` is the sink."""
        return self._next.get(vertex, ())

    def _no_route(self, walk: "_Walk", prompt_tokens: int) -> NoRoute:
        if not walk.with_kv("ignored").open_from(COORDINATOR):
            return NoRoute("no complete pipeline: nodes or links it needs are down or draining", cause="topology")
        if not walk.with_kv("empty").open_from(COORDINATOR):
            return NoRoute(
                f"{prompt_tokens} prompt tokens do not fit into the KV cache of any pipeline, even an empty one",
                cause="topology",
            )
        return NoRoute("every pipeline's KV cache is full", cause="kv")


class _Walk:
    """Which hops lead to the sink for one sequence. `kv`: room as it is now, as if nodes were empty, or ignored."""

    def __init__(
        self,
        router: Router,
        prompt_tokens: int,
        tokens: int,
        masked_nodes: frozenset[NodeId],
        masked_links: frozenset[Link],
        kv: str = "now",
    ) -> None:
        self._router = router
        self._prompt_tokens = prompt_tokens
        self._tokens = tokens
        self._masked_nodes = masked_nodes
        self._masked_links = masked_links
        self._kv = kv
        self._ways: dict[NodeId, tuple[NodeId, ...]] = {}

    def with_kv(self, kv: str) -> "_Walk":
        """The same walk with another view of KV room."""
        return _Walk(
            self._router, self._prompt_tokens, self._tokens, self._masked_nodes, self._masked_links, kv
        )  # fmt: skip

    def tokens_at(self, node: NodeId, layers: int) -> int:
        """What to reserve there: the expectation, as far as the node could ever keep it, but the prompt at least."""
        affordable = self._router.ledger.affordable_tokens(node, layers)
        return min(self._tokens, max(self._prompt_tokens + 1, affordable))

    def open_from(self, vertex: NodeId) -> bool:
        """Whether the sink can be reached from `vertex`."""
        return bool(self.ways(vertex))

    def ways(self, vertex: NodeId) -> tuple[NodeId, ...]:
        """Next hops from `vertex` that are admissible and lead on to the sink.

        What a hop costs depends only on the vertex before it, where the entry is its end: so one answer per vertex.
        """
        if vertex not in self._ways:
            self._resolve(vertex)
        return self._ways[vertex]

    def _resolve(self, start: NodeId) -> None:
        # Depth first without recursion: a chain may be as long as the model has layers.
        stack = [start]
        while stack:
            vertex = stack[-1]
            hops = [hop for hop in self._router.next_hops(vertex) if self._admits(vertex, hop)]
            unknown = [hop for hop in hops if hop != COORDINATOR and hop not in self._ways]
            if unknown:
                stack.extend(unknown)
                continue
            self._ways[vertex] = tuple(hop for hop in hops if hop == COORDINATOR or self._ways[hop])
            stack.pop()

    def _admits(self, vertex: NodeId, hop: NodeId) -> bool:
        if (vertex, hop) in self._masked_links:
            return False
        if hop == COORDINATOR:
            return True
        if hop in self._masked_nodes:
            return False
        if self._kv == "ignored":
            return True
        placement = self._router.plan.placement
        layers = placement[hop].end - (0 if vertex == COORDINATOR else placement[vertex].end)
        tokens = self.tokens_at(hop, layers)
        ledger = self._router.ledger
        if self._kv == "empty":
            return tokens <= ledger.affordable_tokens(hop, layers)
        return ledger.fits(hop, layers, tokens)
