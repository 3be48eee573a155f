from helixd.ids import NodeId
from helixd.plan.cluster.spec import COORDINATOR
from helixd.sim.job import Job, Request
from helixd.sim.wires import Wire
from helixd.sim.world import World, run_window


class Mailbox:
    """Takes what arrives as it arrives."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.asleep_until_s = float("inf")
        self.wires: list[Wire] = []
        self.came: list[tuple[float, int, int]] = []

    def wake(self, at_s: float) -> None:
        self.asleep_until_s = float("inf")
        for wire in self.wires:
            while wire.queue and wire.queue[0][0] <= self.world.now_s:
                at, job, rows = wire.queue.popleft()
                self.came.append((round(at, 6), job.number, rows))
            if wire.queue:
                self.asleep_until_s = min(self.asleep_until_s, wire.queue[0][0])
                self.world.at(wire.queue[0][0], self.wake, wire.queue[0][0])


def line(world: World, *, decode_first: bool = False) -> tuple[Wire, Mailbox]:
    """1 MB/s and 0.5 s of latency: a row of 1000 bytes takes a millisecond."""
    made = Wire(world, NodeId("a"), NodeId("b"), 1e6, 0.5, 1000.0, decode_first=decode_first)
    box = Mailbox(world)
    made.receiver = box
    box.wires.append(made)
    return made, box


def job(number: int, rows: int = 0) -> Job:
    return Job(number, Request(10, 10), 0.0, rows)


def test_events_happen_in_time_and_in_the_order_they_were_set() -> None:
    world = World()
    seen: list[tuple[float, str]] = []
    for at, name in ((2.0, "late"), (1.0, "first"), (1.0, "second"), (3.0, "never")):
        world.at(at, lambda n: seen.append((world.now_s, n)), name)
    world.run(3.0)
    assert seen == [(1.0, "first"), (1.0, "second"), (2.0, "late")]
    assert world.now_s == 3.0
    assert not world.idle


def test_a_window_begins_once_also_at_the_very_start() -> None:
    for start_s in (0.0, 0.5, 2.0):
        for shares in (None, list[float]()):
            world = World()
            begun: list[float] = []
            run_window(
                world,
                start_s,
                2.0,
                lambda w=world, b=begun: b.append(w.now_s),  # type: ignore[misc]
                shares.append if shares is not None else None,
            )
            assert begun == [start_s]
            assert world.now_s == 2.0
            assert shares is None or (len(shares) == 100 and shares[-1] == 1.0)


def test_one_message_at_a_time_and_latency_does_not_hold_the_link() -> None:
    world = World()
    link, box = line(world)
    link.send(job(1, 100), 100)
    link.send(job(2), 0)
    world.run(10)
    assert box.came == [(0.6, 1, 100), (0.601, 2, 0)]


def test_decode_passes_overtake_prefill_that_waits_and_nothing_is_lost() -> None:
    world = World()
    link, box = line(world, decode_first=True)
    link.send(job(1, 1000), 1000)
    world.at(0.1, lambda _: link.send(job(2), 0))
    world.run(10)
    rows = {n: sum(r for _, number, r in box.came if number == n) for n in (1, 2)}
    assert rows == {1: 1000, 2: 0}
    assert max(at for at, number, _ in box.came if number == 1) == 1.501
    decode = next(at for at, number, _ in box.came if number == 2)
    # It waits for the piece that is under way (262 rows), not for the whole prompt.
    assert 0.6 < decode < 0.9
    assert [at for at, _, _ in box.came] == sorted(at for at, _, _ in box.came)


def test_without_it_a_decode_pass_waits_for_the_whole_prompt() -> None:
    world = World()
    link, box = line(world)
    link.send(job(1, 1000), 1000)
    world.at(0.1, lambda _: link.send(job(2), 0))
    world.run(10)
    assert box.came == [(1.5, 1, 1000), (1.501, 2, 0)]


def test_prompts_on_one_link_keep_their_order() -> None:
    world = World()
    link, box = line(world, decode_first=True)
    for number in (1, 2, 3):
        link.send(job(number, 300), 300)
    world.run(10)
    assert [number for _, number, _ in box.came] == sorted(number for _, number, _ in box.came)
    assert sum(rows for _, _, rows in box.came) == 900


def test_towards_the_coordinator_a_message_is_delivered_when_it_arrives() -> None:
    world = World()
    came: list[float] = []
    link = Wire(world, NodeId("a"), COORDINATOR, 1e6, 0.5, 1000.0)
    link.deliver = lambda _: came.append(world.now_s)
    link.send(job(1), 0)
    world.run(10)
    assert came == [0.501]
