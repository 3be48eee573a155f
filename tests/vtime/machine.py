"""The rules by which Hypothesis breaks a virtual cluster: what may happen to it, at any time, in any order."""

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from helixd.layers import LayerRange
from helixd.plan.plan import Infeasible
from tests.vtime.invariants import check, settle
from tests.vtime.planner import most_layers, plan_of
from tests.vtime.world import HUB, MACHINES, NUM_LAYERS, world

NAMES = sorted(MACHINES)
PEERS = [HUB, *NAMES]
TIMES = st.sampled_from([0.0, 0.001, 0.004, 0.02, 0.1, 0.4, 1.0, 3.5, 12.0])


class ClusterMachine(RuleBasedStateMachine):
    """A cluster and what happens to it. Its `teardown` settles it: everything must come right again."""

    def __init__(self) -> None:
        super().__init__()
        self.opened = None
        self.sound = True

    @initialize(
        seed=st.integers(0, 1 << 16),
        names=st.sets(st.sampled_from(NAMES), min_size=3),
        wait_s=st.sampled_from([4.0, 4.0, 0.5]),
    )
    def begin(self, seed: int, names: set[str], wait_s: float) -> None:
        self.opened = world(seed)
        self.world = self.opened.__enter__()
        for name in sorted(names):
            self.world.start_worker(name)
        self.world.advance(wait_s)

    # -- clients -----------------------------------------------------------------------------------------------------

    @rule(
        length=st.integers(1, 80), first=st.integers(0, 200), max_tokens=st.integers(1, 24),
        n=st.sampled_from([1, 1, 1, 2, 3]), seed=st.integers(0, 3), wait_s=TIMES,
    )  # fmt: skip
    def submit(self, length: int, first: int, max_tokens: int, n: int, seed: int, wait_s: float) -> None:
        prompt = tuple((first + i * i) % 250 for i in range(length))
        self.world.clients.ask(prompt, max_tokens, n=n, seed=seed)
        self.world.advance(wait_s)

    @rule(
        length=st.integers(1, 40), max_tokens=st.integers(0, 24), logprobs=st.sampled_from([None, 0, 2]),
        score=st.booleans(),
        deadline_s=st.sampled_from([None, None, 0.05, 1.0, 30.0]), read_delay_s=st.sampled_from([0.0, 0.01, 1.0]),
        stop_at=st.sampled_from([None, 0, 3]), wait_s=TIMES,
    )  # fmt: skip
    def submit_with_extras(
        self, length: int, max_tokens: int, logprobs: int | None, score: bool, deadline_s: float | None,
        read_delay_s: float, stop_at: int | None, wait_s: float,
    ) -> None:  # fmt: skip
        prompt = tuple(range(length))
        self.world.clients.ask(
            prompt, max_tokens if score else max(1, max_tokens), logprobs=logprobs, score=score, deadline_s=deadline_s,
            read_delay_s=read_delay_s, stop_at=stop_at,
        )  # fmt: skip
        self.world.advance(wait_s)

    @rule(count=st.integers(2, 8), length=st.integers(20, 90), max_tokens=st.integers(8, 60), wait_s=TIMES)
    def burst(self, count: int, length: int, max_tokens: int, wait_s: float) -> None:
        for at in range(count):
            self.world.clients.ask(tuple(range(at, at + length)), max_tokens, seed=at)
        self.world.advance(wait_s)

    @precondition(lambda self: self.world.clients.running)
    @rule(data=st.data(), wait_s=TIMES)
    def cancel(self, data: st.DataObject, wait_s: float) -> None:
        running = self.world.clients.running
        self.world.clients.leave(running[data.draw(st.integers(0, len(running) - 1))])
        self.world.advance(wait_s)

    # -- workers -----------------------------------------------------------------------------------------------------

    @rule(name=st.sampled_from(NAMES), wait_s=TIMES)
    def join(self, name: str, wait_s: float) -> None:
        self.world.forget_left()
        if name not in self.world.workers:
            self.world.start_worker(name)
        self.world.advance(wait_s)

    @precondition(lambda self: self.world.workers)
    @rule(data=st.data(), wait_s=TIMES, back_s=st.sampled_from([None, 0.0, 0.5, 2.0]))
    def kill(self, data: st.DataObject, wait_s: float, back_s: float | None) -> None:
        name = data.draw(st.sampled_from(sorted(self.world.workers)))
        self.world.kill_worker(name)
        self.world.advance(wait_s)
        if back_s is not None:
            self.world.advance(back_s)
            self.world.start_worker(name)

    @precondition(lambda self: self.world.workers)
    @rule(data=st.data(), wait_s=TIMES)
    def leave(self, data: st.DataObject, wait_s: float) -> None:
        self.world.leave(data.draw(st.sampled_from(sorted(self.world.workers))))
        self.world.advance(wait_s)
        self.world.forget_left()

    @precondition(lambda self: self.world.workers)
    @rule(data=st.data(), wait_s=TIMES)
    def stop(self, data: st.DataObject, wait_s: float) -> None:
        self.world.stop(data.draw(st.sampled_from(sorted(self.world.workers))))
        self.world.advance(wait_s)

    @precondition(lambda self: self.world.workers)
    @rule(data=st.data(), wait_s=TIMES)
    def cont(self, data: st.DataObject, wait_s: float) -> None:
        self.world.cont(data.draw(st.sampled_from(sorted(self.world.workers))))
        self.world.advance(wait_s)

    # -- the network -------------------------------------------------------------------------------------------------

    @rule(one=st.sampled_from(PEERS), other=st.sampled_from(PEERS), both_ways=st.booleans(), wait_s=TIMES)
    def partition(self, one: str, other: str, both_ways: bool, wait_s: float) -> None:
        if one != other:
            self.world.cut_off(one, other, both_ways=both_ways)
        self.world.advance(wait_s)

    @precondition(lambda self: self.world.cut)
    @rule(data=st.data(), wait_s=TIMES)
    def heal(self, data: st.DataObject, wait_s: float) -> None:
        self.world.heal(*data.draw(st.sampled_from(sorted(self.world.cut))))
        self.world.advance(wait_s)

    @precondition(lambda self: self.world.workers)
    @rule(data=st.data(), wait_s=TIMES)
    def reset_link(self, data: st.DataObject, wait_s: float) -> None:
        one = data.draw(st.sampled_from(sorted(self.world.workers)))
        other = data.draw(st.sampled_from(PEERS))
        if one != other:
            self.world.reset_link(one, other)
        self.world.advance(wait_s)

    # -- the coordinator ---------------------------------------------------------------------------------------------

    @rule(data=st.data(), wait_s=TIMES)
    def replan(self, data: st.DataObject, wait_s: float) -> None:
        spec = self.world.spec()
        placement = {}
        for node in spec.nodes:
            size = data.draw(st.integers(0, most_layers(spec, node)))
            if size:
                start = data.draw(st.integers(0, NUM_LAYERS - size))
                placement[node.id] = LayerRange(start, start + size)
        try:
            plan = plan_of(spec, placement)
        except Infeasible:
            return
        self.world.push(plan)
        self.world.advance(wait_s)

    @rule(after_s=st.sampled_from([0.0, 0.3, 4.0]), wait_s=TIMES)
    def restart_coordinator(self, after_s: float, wait_s: float) -> None:
        self.world.restart_coordinator(after_s)
        self.world.advance(wait_s)

    @rule(seconds=TIMES)
    def wait(self, seconds: float) -> None:
        self.world.advance(seconds)

    # -- what holds --------------------------------------------------------------------------------------------------

    @invariant()
    def holds(self) -> None:
        if self.opened is not None:
            try:
                check(self.world)
            except AssertionError:
                self.sound = False
                raise

    def teardown(self) -> None:
        if self.opened is None:
            return
        try:
            if self.sound:
                settle(self.world)
        finally:
            self.opened.__exit__(None, None, None)
            self.opened = None
        assert not self.world.wrong, "\n".join(self.world.wrong)
