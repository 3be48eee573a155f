"""Who gets a route, who waits, who gives way: the queue, the router and the ledger together, with sequences that say
nothing."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helixd.coordinator.admission import KV_PAGE_TOKENS, Admission
from helixd.coordinator.sequence import Arrival, Broken, Lease
from helixd.errors import NoRoute
from helixd.ids import Epoch, NodeId, SequenceId
from helixd.layers import LayerRange
from helixd.plan.cluster.spec import COORDINATOR
from helixd.plan.plan import Hop, Plan
from helixd.route.admission import QueueFull
from helixd.route.router import Router

A, B = NodeId("a"), NodeId("b")
PAGE = KV_PAGE_TOKENS


def plan_of(*nodes: NodeId) -> Plan:
    """Each node holds the whole model of one layer."""
    return Plan(
        1,
        {node: LayerRange(0, 1) for node in nodes},
        {COORDINATOR: tuple(Hop(node, 1.0) for node in nodes), **{n: (Hop(COORDINATOR, 1.0),) for n in nodes}},
        1.0,
    )


@dataclass
class Text:
    ids: list[int] = field(default_factory=list)


@dataclass(eq=False)
class Run:
    """As much of a sequence as admission sees."""

    order: int
    prompt: int = 10
    max_tokens: int = 1
    attempts: int = 0
    text: Text = field(default_factory=Text)
    lease: Lease | None = None
    considered: asyncio.Event = field(default_factory=asyncio.Event)
    turned_away: bool = False
    told: list[Broken] = field(default_factory=list)

    @property
    def id(self) -> SequenceId:
        return SequenceId(self.order)

    @property
    def tokens(self) -> int:
        return self.prompt + len(self.text.ids)

    @property
    def recovering(self) -> bool:
        return self.attempts > 0

    def begin(self, lease: Lease) -> None:
        self.lease = lease
        self.attempts += 1

    def deliver(self, arrival: Arrival) -> None:
        assert isinstance(arrival, Broken)
        self.told.append(arrival)


@dataclass
class Desk:
    """Admission at work. `down`: masked nodes."""

    admission: Admission
    down: set[NodeId]
    waiters: dict[int, asyncio.Task[Lease]] = field(default_factory=dict)

    def ask(self, run: Run) -> asyncio.Task[Lease]:
        self.waiters[run.order] = asyncio.create_task(self.admission.acquire(run))  # type: ignore[arg-type]
        return self.waiters[run.order]

    def free(self, run: Run) -> None:
        """Over, and the nodes confirm it."""
        assert run.lease is not None
        self.admission.forget(run.lease)
        for hop in run.lease.route.hops:
            self.admission.freed(hop.node, run.id, run.lease.attempt)

    async def granted(self) -> list[int]:
        await asyncio.sleep(0.02)
        return sorted(order for order, task in self.waiters.items() if task.done())


@asynccontextmanager
async def desk(
    rooms: dict[NodeId, int], *, planned: bool = True, failover_wait_s: float = 30.0, queue: int = 4
) -> AsyncIterator[Desk]:
    down: set[NodeId] = set()
    admission = Admission(queue, failover_wait_s, 1.0, lambda: (down, ()))
    if planned:
        admission.use_plan(Epoch(1), Router(plan_of(*rooms), rooms, ledger=admission.ledger))
    task = asyncio.create_task(admission.run(tick_s=0.005))
    made = Desk(admission, down)
    try:
        yield made
    finally:
        for each in (task, *made.waiters.values()):
            each.cancel()
        await asyncio.wait({task, *made.waiters.values()})


async def test_a_route_is_granted_reserved_and_free_again_when_every_node_says_so() -> None:
    async with desk({A: 4 * PAGE}) as made:
        run = Run(1)
        lease = await made.ask(run)
        assert lease is run.lease
        assert (lease.attempt, lease.epoch, lease.route.nodes) == (0, 1, (A,))
        assert made.admission.running == 1
        assert made.admission.ledger.total_used() == PAGE
        made.admission.forget(lease)
        assert (made.admission.running, made.admission.ledger.total_used()) == (0, PAGE)
        made.admission.freed(A, run.id, lease.attempt)
        assert made.admission.ledger.total_used() == 0


async def test_a_route_tells_how_much_is_computed_before_it() -> None:
    async with desk({A: 8 * PAGE}) as made:
        runs = [Run(1, prompt=30), Run(2, prompt=20), Run(3, prompt=10)]
        assert [(await made.ask(run)).ahead_tokens for run in runs] == [0, 30, 50]
        assert runs[0].lease is not None
        made.admission.progressed(runs[0].lease, 31)
        assert (await made.ask(Run(4))).ahead_tokens == 30


async def test_without_a_plan_everybody_waits_for_one() -> None:
    async with desk({A: 4 * PAGE}, planned=False) as made:
        made.ask(Run(1))
        assert await made.granted() == []
        assert not made.admission.full
        router = Router(plan_of(A), {A: 4 * PAGE}, ledger=made.admission.ledger)
        made.admission.use_plan(Epoch(3), router)
        assert (await made.waiters[1]).epoch == 3


async def test_full_kv_makes_the_next_wait_and_a_freed_node_lets_it_in() -> None:
    async with desk({A: 2 * PAGE}) as made:
        runs = [Run(n, prompt=PAGE - 1) for n in (1, 2)]
        for run in runs:
            made.ask(run)
        assert await made.granted() == [1]
        assert made.admission.waiting == 1
        made.free(runs[0])
        assert await made.granted() == [1, 2]


async def test_recovering_sequences_go_first_the_oldest_of_them_at_the_head() -> None:
    async with desk({A: 2 * PAGE}) as made:
        holder = Run(1, prompt=PAGE - 1)
        await made.ask(holder)
        new, late, early = Run(2, prompt=PAGE - 1), Run(5, PAGE - 1, attempts=1), Run(3, PAGE - 1, attempts=2)
        order: list[int] = []
        for run in (new, late, early):
            made.ask(run).add_done_callback(lambda _, run=run: order.append(run.order))  # type: ignore[misc]
        for run in (holder, early, late, new):
            await made.granted()
            made.free(run)
        assert order == [3, 5, 2]


async def test_the_queue_counts_as_full_on_both_sides_of_its_limit() -> None:
    async with desk({A: PAGE}, queue=2) as made:
        await made.ask(Run(1))
        made.ask(Run(2))
        await made.granted()
        assert not made.admission.full
        made.ask(Run(3))
        await made.granted()
        assert made.admission.full


async def test_what_comes_at_once_and_finds_no_room_is_turned_away_beyond_the_limit() -> None:
    async with desk({A: 2 * PAGE}, queue=2) as made:
        runs = [Run(n, prompt=PAGE - 1) for n in range(6)]
        for run in runs:
            made.ask(run)
        # One has a route, two may wait; the others hear of it at once.
        assert await made.granted() == [0, 3, 4, 5]
        assert all(run.considered.is_set() for run in runs)
        assert [run.order for run in runs if run.turned_away] == [3, 4, 5]
        for order in (3, 4, 5):
            with pytest.raises(QueueFull, match="2 are waiting"):
                made.waiters.pop(order).result()
        assert made.admission.waiting == 2
        for run in runs[:2]:
            made.free(run)
            await made.granted()
        assert await made.granted() == [0, 1, 2]


async def test_no_queue_at_all_still_serves_what_has_room() -> None:
    async with desk({A: 2 * PAGE}, queue=0) as made:
        assert not made.admission.full
        holder = Run(1, prompt=PAGE - 1)
        await made.ask(holder)
        with pytest.raises(QueueFull):
            await made.ask(Run(2, prompt=PAGE - 1))
        moved = made.ask(Run(3, prompt=PAGE - 1, attempts=1))
        await made.granted()
        assert not moved.done()
        made.free(holder)
        await moved


async def test_what_no_pipeline_can_serve_is_told_so_after_the_wait() -> None:
    async with desk({A: PAGE}, failover_wait_s=0.02) as made:
        made.down.add(A)
        with pytest.raises(NoRoute, match="waited 0"):
            await made.ask(Run(1))
        assert made.admission.waiting == 0
        made.down.clear()
        with pytest.raises(NoRoute, match="do not fit"):
            await made.ask(Run(2, prompt=PAGE + 1))
        await made.ask(Run(3))


async def test_full_kv_is_waited_for_longer_than_a_lost_pipeline() -> None:
    async with desk({A: PAGE}, failover_wait_s=0.01) as made:
        await made.ask(Run(1))
        waiting = made.ask(Run(2))
        await asyncio.sleep(0.05)
        assert not waiting.done()


async def test_a_pipeline_that_comes_back_in_time_serves_who_waited() -> None:
    async with desk({A: PAGE}) as made:
        made.down.add(A)
        waiting = made.ask(Run(1))
        assert await made.granted() == []
        made.down.clear()
        made.admission.something_changed()
        assert (await waiting).route.nodes == (A,)


async def test_who_leaves_the_line_is_forgotten() -> None:
    async with desk({A: PAGE}) as made:
        first = Run(1)
        await made.ask(first)
        made.ask(Run(2))
        made.ask(Run(3))
        await made.granted()
        made.waiters.pop(2).cancel()
        await made.granted()
        assert made.admission.waiting == 1
        made.free(first)
        assert await made.granted() == [1, 3]
        assert made.admission.running == 1


async def test_a_grant_is_the_sequences_at_once_and_can_break_at_once() -> None:
    """Between the grant and the moment its task runs a node may go: the sequence must hear of it."""
    async with desk({A: PAGE}) as made:
        run = Run(1)
        task = made.ask(run)
        while run.lease is None:
            assert not task.done()
            await asyncio.sleep(0)
        assert made.admission.break_where(lambda lease: True, "peer_lost", "gone") == 1
        assert [broken.attempt for broken in run.told] == [0]


async def test_an_overfull_node_sends_its_youngest_away_and_never_its_only_one() -> None:
    async with desk({A: 3 * PAGE}) as made:
        runs = [Run(n) for n in (4, 2)]
        for run in runs:
            await made.ask(run)
        old = runs[1]
        assert old.lease is not None
        made.admission.progressed(old.lease, 2 * PAGE)
        assert not runs[0].told
        made.admission.progressed(old.lease, 2 * PAGE + 1)
        assert [broken.code for broken in runs[0].told] == ["preempted"]
        assert made.admission.shares(A, old.id)
        assert not old.told
        made.free(runs[0])
        assert not made.admission.shares(A, old.id)
        made.admission.progressed(old.lease, 9 * PAGE)
        assert not old.told


async def test_only_the_sequences_that_are_hit_break() -> None:
    async with desk({A: 9 * PAGE, B: 9 * PAGE}) as made:
        runs = [Run(n) for n in range(1, 5)]
        for run in runs:
            await made.ask(run)
        assert made.admission.break_where(lambda lease: A in lease.route.nodes, "peer_lost", "gone") == 2
        assert sum(bool(run.told) for run in runs) == 2
        made.admission.node_gone(A)
        assert made.admission.ledger.used(A) == 0
        assert made.admission.ledger.used(B) == 2 * PAGE


async def test_readiness_follows_plan_and_masks() -> None:
    async with desk({A: PAGE}) as made:
        assert made.admission.has_pipeline()
        assert made.admission.fits_when_empty(PAGE - 1)
        assert not made.admission.fits_when_empty(PAGE)
        made.down.add(A)
        assert not made.admission.has_pipeline()
        made.admission.use_plan(Epoch(2), None)
        assert not made.admission.has_pipeline()
        assert made.admission.fits_when_empty(10**9)


async def test_how_long_a_sequence_can_grow_counts_whole_pages() -> None:
    async with desk({A: 3 * PAGE + PAGE // 2, B: PAGE}) as made:
        assert made.admission.longest(10**6) == 3 * PAGE
        assert made.admission.longest(2 * PAGE + 1) == 2 * PAGE + 1
        assert made.admission.fits_when_empty(3 * PAGE - 1)
        assert not made.admission.fits_when_empty(3 * PAGE)
        made.admission.use_plan(Epoch(2), None)
        assert made.admission.longest(10**6) == 10**6
    async with desk({A: PAGE - 1}) as made:
        assert made.admission.longest(10**6) == 0


actions = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 7)), max_size=30)


@settings(max_examples=60, deadline=None)
@given(rooms=st.lists(st.integers(1, 4), min_size=1, max_size=2), actions=actions)
async def test_no_reservation_outlives_its_sequence(rooms: Sequence[int], actions: list[tuple[int, int]]) -> None:
    """Ask, end, leave the line, lose a node, in any order: the books balance at the end."""
    nodes = dict(zip((A, B), (room * PAGE for room in rooms), strict=False))
    async with desk(nodes) as made:
        runs: dict[int, Run] = {}
        born = 0

        def end(run: Run, number: int) -> None:
            task = made.waiters.pop(run.order)
            if run.lease is not None:
                made.free(run)
            task.cancel()
            del runs[number]

        for action, number in actions:
            if action == 0 and number not in runs:
                born += 1
                runs[number] = Run(born, prompt=PAGE // 2)
                made.ask(runs[number])
            elif action == 1 and number in runs:
                end(runs[number], number)
            elif action == 2:
                await asyncio.sleep(0.006)
            elif action == 3 and number == 0:
                for run in [r for r in runs.values() if r.lease and A in r.lease.route.nodes]:
                    assert run.lease is not None
                    made.admission.forget(run.lease)
                made.admission.node_gone(A)
            leases = list(made.admission.leases())
            assert len({lease.sequence for lease in leases}) == len(leases)
            for node, room in nodes.items():
                assert made.admission.ledger.used(node) <= room
        for number, run in list(runs.items()):
            end(run, number)
        await asyncio.sleep(0)
        assert made.admission.ledger.total_used() == 0
        assert made.admission.running == 0
        await asyncio.sleep(0)
        assert made.admission.waiting == 0
