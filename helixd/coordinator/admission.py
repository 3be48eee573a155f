"""Who gets a route and who waits for one: the queue in front of the router, and the KV ledger's day-to-day.

Runs `helixd.route` on the clock: draws under the masks of the moment, lets small requests pass a head that does not
fit, holds what has no pipeline for `failover_wait_s`, makes the youngest give way where a node's KV overflows. A
sequence that had a route before goes ahead of new ones, the oldest first, and is never refused for a full queue. A new
one is refused at the first look at it, if there is neither room for it nor a place in line.
"""

import asyncio
import time
from collections.abc import Callable, Collection, Iterator

from helixd.coordinator.sequence import Broken, Lease, SequenceRun
from helixd.errors import NoRoute
from helixd.ids import Attempt, Epoch, NodeId, SequenceId
from helixd.route.admission import AdmissionQueue, QueueFull
from helixd.route.expectation import OutputLength
from helixd.route.ledger import KvLedger
from helixd.route.router import Link, Route, Router

EVERYBODY = 1 << 30
OLDEST_FIRST = 1 << 50
KV_PAGE_TOKENS = 64
"""Workers give KV out in pages; a reservation that ends within one is rounded up to it."""


class _Waiter:
    """A sequence in line."""

    def __init__(self, run: SequenceRun) -> None:
        self.run = run
        self.lease: asyncio.Future[Lease] = asyncio.get_running_loop().create_future()
        self.stranded_since_s: float | None = None


class Admission:
    """The one owner of the queue, the ledger and the sequences that hold routes.

    `preemptions`: how often a sequence lost its route for want of KV room.
    """

    def __init__(
        self, queue_limit: int, failover_wait_s: float, mean_output_tokens: float,
        masks: Callable[[], tuple[Collection[NodeId], Collection[Link]]],
    ) -> None:  # fmt: skip
        self.ledger = KvLedger({}, page_tokens=KV_PAGE_TOKENS)
        self._queue: AdmissionQueue[_Waiter] = AdmissionQueue(EVERYBODY)
        self._queue_limit = queue_limit
        self._failover_wait_s = failover_wait_s
        self._lengths = OutputLength(mean_output_tokens)
        self._masks = masks
        self._router: Router | None = None
        self._epoch = Epoch(0)
        self._holders: dict[SequenceId, tuple[SequenceRun, Lease]] = {}
        self._new: list[_Waiter] = []
        self._changed = asyncio.Event()
        self.preemptions = 0

    # -- what the coordinator says -----------------------------------------------------------------------------------

    def reconfigure(self, queue_limit: int, failover_wait_s: float) -> None:
        """Another limit of the line and another patience, for whoever waits or comes."""
        self._queue_limit, self._failover_wait_s = queue_limit, failover_wait_s
        self._changed.set()

    def use_plan(self, epoch: Epoch, router: Router | None) -> None:
        """Draw from this plan from now on; None: there is none, everybody waits."""
        self._epoch, self._router = epoch, router
        self._changed.set()

    def something_changed(self) -> None:
        """KV came free, or a node or link changed: look at the queue again."""
        self._changed.set()

    def freed(self, node: NodeId, sequence: SequenceId, attempt: Attempt) -> None:
        """A node confirmed that an attempt's KV is free."""
        if self.ledger.release(sequence, node, attempt=attempt):
            self._changed.set()

    def node_gone(self, node: NodeId) -> None:
        """A node and all its KV are gone."""
        self.ledger.forget_node(node)
        self._changed.set()

    def break_where(self, hit: Callable[[Lease], bool], code: str, reason: str) -> int:
        """Break the attempts whose lease is hit; returns how many."""
        hits = [(run, lease) for run, lease in self._holders.values() if hit(lease)]
        for run, lease in hits:
            run.deliver(Broken(lease.attempt, code, reason))
        return len(hits)

    # -- what is seen ------------------------------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        """Sequences in line."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """Sequences with a route."""
        return len(self._holders)

    @property
    def full(self) -> bool:
        """Whether one more new request is surely one too many."""
        return self._router is not None and self.waiting >= max(1, self._queue_limit)

    def leases(self) -> Iterator[Lease]:
        """The routes in use."""
        return iter([lease for _, lease in self._holders.values()])

    def holder(self, sequence: SequenceId) -> SequenceRun | None:
        """The sequence, if it has a route."""
        found = self._holders.get(sequence)
        return None if found is None else found[0]

    def has_pipeline(self) -> bool:
        """Whether requests could run now."""
        nodes, links = self._masks()
        return self._router is not None and self._router.has_pipeline(nodes, links)

    def fits_when_empty(self, prompt_tokens: int) -> bool:
        """Whether a prompt of this length fits into some pipeline at all (true while there is no plan)."""
        return self._router is None or self._router.fits_when_empty(_whole_pages(prompt_tokens + 1) - 1)

    def longest(self, limit: int) -> int:
        """To how many tokens a sequence can grow in some empty pipeline, prompt included; at most `limit`."""
        if self.fits_when_empty(limit - 1):
            return limit
        fits, too_many = 0, -(-limit // KV_PAGE_TOKENS)
        while too_many - fits > 1:
            pages = (fits + too_many) // 2
            if self.fits_when_empty(pages * KV_PAGE_TOKENS - 1):
                fits = pages
            else:
                too_many = pages
        return fits * KV_PAGE_TOKENS

    # -- what sequences do -------------------------------------------------------------------------------------------

    async def acquire(self, run: SequenceRun) -> Lease:
        """A reserved route. Raises NoRoute when there was none for `failover_wait_s`, or none can ever fit; QueueFull.

        `run.considered` is set once the line was looked at with the sequence in it, `run.turned_away` if it may not
        wait there.
        """
        waiter = _Waiter(run)
        priority = OLDEST_FIRST - run.order if run.recovering else 0
        ticket = self._queue.push(waiter, now_s=time.monotonic(), priority=priority)
        if not run.recovering:
            self._new.append(waiter)
        self._changed.set()
        try:
            return await waiter.lease
        finally:
            self._queue.remove(ticket)

    def forget(self, lease: Lease) -> None:
        """The attempt is over; its KV stays reserved until the hops confirm (or are gone)."""
        if self._router is not None:
            self._router.prefilled(lease.sequence, lease.attempt)
        self._holders.pop(lease.sequence, None)

    def ended(self, run: SequenceRun) -> None:
        """A sequence is over: its length teaches what to expect."""
        if run.text.ids:
            self._lengths.observe(len(run.text.ids))

    def progressed(self, lease: Lease, tokens: int) -> None:
        """A sequence grew to `tokens`; where a node overflows, the youngest there gives way."""
        if self._router is not None:
            self._router.prefilled(lease.sequence, lease.attempt)
            self._router.count_decode(lease.route)
        for node in self.ledger.grow(lease.sequence, tokens, attempt=lease.attempt):
            self.relieve(node, "the node's KV cache is full")

    def relieve(self, node: NodeId, reason: str) -> None:
        """Preempt the youngest sequence on a node, unless it is the only one there."""
        here = [
            self._holders[sequence]
            for sequence, attempt in self.ledger.holders(node)
            if sequence in self._holders and self._holders[sequence][1].attempt == attempt
        ]
        if len(here) > 1:
            run, lease = max(here, key=lambda held: held[0].order)
            self.preemptions += 1
            run.deliver(Broken(lease.attempt, "preempted", reason))

    def shares(self, node: NodeId, sequence: SequenceId) -> bool:
        """Whether others have KV on a node, or had and did not confirm yet that it is free."""
        return any(other != sequence for other, _ in self.ledger.holders(node))

    # -- the line ----------------------------------------------------------------------------------------------------

    async def run(self, tick_s: float = 0.25) -> None:
        """Serve the line until cancelled."""
        while True:
            try:
                async with asyncio.timeout(tick_s):
                    await self._changed.wait()
            except TimeoutError:
                pass
            self._changed.clear()
            self._queue.admit(time.monotonic(), self._admit)
            self._turn_away()

    def _turn_away(self) -> None:
        """Of the sequences that came since the last look and found no room, those that find no place in line either."""
        new, self._new = self._new, []
        stay = [waiter for waiter in new if not waiter.lease.done()]
        places = self._queue_limit - (len(self._queue) - len(stay))
        if self._router is not None:
            for waiter in stay[max(0, places) :]:
                waiter.run.turned_away = True
                waiter.lease.set_exception(
                    QueueFull(f"there is no room, and {self._queue_limit} are waiting already; try again later")
                )
        for waiter in new:
            waiter.run.considered.set()

    def _admit(self, waiter: _Waiter) -> bool:
        """Try to give a waiter its route; True takes it out of the line (also with an error)."""
        if waiter.lease.done():
            return True
        try:
            lease = self._draw(waiter.run)
        except NoRoute as error:
            return self._is_hopeless(waiter, error)
        self._holders[waiter.run.id] = (waiter.run, lease)
        waiter.run.begin(lease)
        waiter.lease.set_result(lease)
        return True

    def _draw(self, run: SequenceRun) -> Lease:
        if self._router is None:
            raise NoRoute("no placement of the model is ready", cause="topology")
        nodes, links = self._masks()
        attempt = Attempt(run.attempts)
        expected = self._lengths.expect(max(1, run.max_tokens), emitted=len(run.text.ids))
        reserved = _whole_pages(run.tokens + expected)
        ahead_tokens = self._router.prefill_tokens
        route: Route = self._router.draw(
            run.id, run.tokens, reserved - run.tokens, attempt=attempt, masked_nodes=nodes, masked_links=links
        )
        return Lease(run.id, attempt, self._epoch, route, ahead_tokens)

    def _is_hopeless(self, waiter: _Waiter, error: NoRoute) -> bool:
        now = time.monotonic()
        if error.cause == "kv":
            waiter.stranded_since_s = None
            return False
        if waiter.stranded_since_s is None:
            waiter.stranded_since_s = now
        if now - waiter.stranded_since_s < self._failover_wait_s:
            return False
        waiter.lease.set_exception(
            NoRoute(f"{error.reason}; waited {self._failover_wait_s:g} s for another", cause=error.cause)
        )
        return True


def _whole_pages(tokens: int) -> int:
    return -(-tokens // KV_PAGE_TOKENS) * KV_PAGE_TOKENS
