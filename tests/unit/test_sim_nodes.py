from dataclasses import replace

import pytest

from helixd.ids import NodeId
from helixd.layers import LayerRange
from helixd.plan.cluster.spec import COORDINATOR, BatchLimits
from helixd.sim.job import Job, Request
from helixd.sim.paper_node import LayerwiseNode
from helixd.sim.stage_node import StageNode, StepLimits
from helixd.sim.times import LayerTimes
from helixd.sim.wires import Wire
from helixd.sim.world import World
from tests.unit.sim_worlds import timed

PROFILE = timed("n").profile
NONE = BatchLimits()
# No time to copy activations: what is left is what the layers take.
NO_BYTES = 0.0


class Line:
    """A node with a wire in at each entry, and one out whose deliveries are kept. Wires take next to no time."""

    def __init__(self, held: tuple[int, int], entries: tuple[int, ...], limits: BatchLimits | StepLimits) -> None:
        self.world = World()
        self.left: list[tuple[float, int]] = []
        self.node: StageNode | LayerwiseNode
        times = LayerTimes(PROFILE)
        self.out = Wire(self.world, NodeId("n"), COORDINATOR, 1e12, 0.0, 1.0)
        self.out.deliver = lambda job: self.left.append((round(self.world.now_s, 6), job.number))
        self.ins = [Wire(self.world, NodeId("x"), NodeId("n"), 1e12, 0.0, 1.0, entry=at) for at in entries]
        if isinstance(limits, StepLimits):
            stage = StageNode(self.world, NodeId("n"), LayerRange(*held), times, limits, NO_BYTES)
            for wire in self.ins:
                stage.connect(wire)
            self.node = stage
            return
        paper = LayerwiseNode(self.world, NodeId("n"), LayerRange(*held), times, limits, NO_BYTES, self._leave)
        for wire in self.ins:
            wire.receiver = paper
            paper.inbound.append(wire)
        self.node = paper

    def send(self, number: int, rows: int, *, at_s: float = 0.0, entry: int = 0) -> Job:
        job = Job(number, Request(max(rows, 1), 10), 0.0, rows)
        job.wires = [self.ins[entry], self.out]
        self.world.at(at_s, lambda _: job.wires[0].send(job, rows))
        return job

    def _leave(self, _: LayerwiseNode, jobs: list[Job]) -> None:
        for job in jobs:
            self.out.send(job, 0)


def test_the_paper_runs_one_layer_at_a_time_and_a_lone_decode_counts_twice() -> None:
    line = Line((0, 2), (0,), NONE)
    line.send(1, 0)
    line.world.run(1)
    # decode_time(1) is 1 ms here, half of decode_time(2).
    assert line.left == [(0.004, 1)]
    assert line.node.busy_s == pytest.approx(0.004)


def test_the_paper_batches_what_waits_in_front_of_a_layer() -> None:
    line = Line((0, 2), (0,), NONE)
    line.send(1, 100)
    # Both come while layer 0 is busy with the prompt, and wait until layer 1 is done with it: 2 x 10 ms.
    for number in (2, 3):
        line.send(number, 0, at_s=0.001)
    line.world.run(1)
    assert line.left == [(0.02, 1), (0.024, 2), (0.024, 3)]


def test_the_paper_cuts_batches_but_lets_decodes_pass_a_prompt_too_many() -> None:
    line = Line((0, 1), (0,), replace(NONE, prompt_max_requests=1, decode_max_tokens=2))
    line.send(0, 1000)
    for number, rows in ((1, 100), (2, 100), (3, 0), (4, 0), (5, 0)):
        line.send(number, rows, at_s=0.001)
    line.world.run(1)
    assert [number for _, number in line.left] == [0, 1, 3, 4, 2, 5]


def test_the_paper_counts_the_context_of_a_batch_where_it_is_limited() -> None:
    line = Line((0, 1), (0,), replace(NONE, prompt_max_requests=9, decode_max_context=1))
    line.send(0, 1000)
    for number in (1, 2):
        line.send(number, 0, at_s=0.001)
    # The check is made where a queue is long or has prompts in it.
    line.send(3, 10, at_s=0.001)
    line.world.run(1)
    assert [number for _, number in line.left] == [0, 1, 3, 2]


def test_a_prompt_longer_than_the_limit_goes_alone() -> None:
    line = Line((0, 1), (0,), replace(NONE, prompt_max_requests=9, prompt_max_tokens=50))
    line.send(0, 10)
    line.send(1, 100, at_s=0.0005)
    line.send(2, 20, at_s=0.0005)
    line.world.run(1)
    assert [number for _, number in line.left] == [0, 1, 2]
    assert len({at for at, _ in line.left}) == 3


def test_a_paper_sequence_that_enters_in_the_middle_uses_only_the_layers_after() -> None:
    line = Line((0, 4), (0, 3), NONE)
    line.send(1, 0, entry=1)
    line.world.run(1)
    assert line.left == [(0.002, 1)]


def test_a_stage_runs_its_whole_range_and_never_below_the_floor() -> None:
    line = Line((0, 3), (0,), StepLimits())
    line.send(1, 0)
    line.world.run(1)
    assert line.left == [(0.006, 1)]


def test_a_stage_charges_each_layer_for_those_who_entered_before_it() -> None:
    line = Line((0, 4), (0, 2), StepLimits())
    line.send(9, 0)
    for number in range(3):
        line.send(number, 0, at_s=0.001, entry=1)
    line.send(3, 0, at_s=0.001)
    line.world.run(1)
    first, rest = line.left[0], line.left[1:]
    assert first == (0.008, 9)
    decode = LayerTimes(PROFILE).decode
    assert {at for at, _ in rest} == {round(0.008 + 2 * decode(2) + 2 * decode(4), 6)}


def test_prefill_goes_in_chunks_and_decodes_do_not_wait_for_a_whole_prompt() -> None:
    line = Line((0, 1), (0,), StepLimits(chunk_tokens=100, prefill_turns=0))
    line.send(1, 1000)
    line.send(2, 0, at_s=0.001)
    line.world.run(1)
    when = {number: at for at, number in line.left}
    assert when[2] == pytest.approx(0.01 + 0.01 + LayerTimes(PROFILE).decode(1), abs=1e-5)
    assert when[1] > 0.1


def test_prefill_turns_let_chunks_go_alone_in_between() -> None:
    line = Line((0, 1), (0,), StepLimits(chunk_tokens=100, prefill_turns=2))
    line.send(1, 1000)
    line.send(2, 0, at_s=0.001)
    line.world.run(1)
    when = {number: at for at, number in line.left}
    # Two chunks alone, then one together with the decode pass.
    assert when[2] == pytest.approx(0.03 + LayerTimes(PROFILE).decode(1), abs=1e-5)


def test_a_stage_takes_no_more_decodes_than_it_may() -> None:
    line = Line((0, 1), (0,), StepLimits(max_sequences=2))
    line.send(0, 0)
    for number in range(1, 6):
        line.send(number, 0, at_s=0.001)
    line.world.run(1)
    instants = [at for at, _ in line.left]
    assert max(instants.count(at) for at in instants) == 2
    assert len(instants) == 6


def test_the_token_comes_when_the_last_chunk_is_done_and_the_dead_are_skipped() -> None:
    line = Line((0, 1), (0,), StepLimits(chunk_tokens=100))
    dead = line.send(1, 500)
    line.send(2, 300)
    line.world.at(0.015, lambda _: setattr(dead, "alive", False))
    line.world.run(1)
    assert [number for _, number in line.left] == [2]
    assert line.node.busy_s == pytest.approx(0.02 + 0.03, abs=1e-4)


def test_a_node_that_dies_forgets_all_and_serves_again_when_it_is_back() -> None:
    line = Line((0, 1), (0,), StepLimits())
    stage = line.node
    assert isinstance(stage, StageNode)
    line.send(1, 1000)
    line.world.at(0.005, lambda _: stage.forget_everything())
    line.world.at(0.006, lambda _: stage.come_back())
    line.send(2, 0, at_s=0.007)
    line.world.run(1)
    assert line.left == [(0.009, 2)]


def test_layer_times_need_to_be_known() -> None:
    with pytest.raises(ValueError, match="measured"):
        LayerTimes(replace(PROFILE, decode_layer_time_s=()))


@pytest.mark.parametrize(("frames", "left"), [(False, [(0.004, 1), (0.008, 2)]), (True, [(0.004, 1), (0.004, 2)])])
def test_passes_in_one_frame_arrive_together_and_share_an_idle_nodes_step(
    frames: bool, left: list[tuple[float, int]]
) -> None:
    line = Line((0, 2), (0,), StepLimits())
    line.ins[0].frames = frames
    for number in (1, 2):
        line.send(number, 0)
    line.world.run(1)
    assert line.left == left
    assert line.ins[0].passes == 2


def test_a_frame_takes_the_link_as_long_as_its_rows_do_and_does_not_wait_for_prefill_of_the_same_step() -> None:
    world = World()
    came: list[tuple[float, int]] = []
    wire = Wire(world, NodeId("x"), COORDINATOR, 10.0, 0.5, 1.0, decode_first=True, frames=True)
    wire.deliver = lambda job: came.append((round(world.now_s, 6), job.number))
    jobs = [Job(number, Request(1, 10), 0.0, rows) for number, rows in ((1, 0), (2, 0), (3, 4))]

    def send(_: None) -> None:
        for job in jobs:
            wire.send(job, job.rows)

    world.at(0.0, send)
    world.run(5)
    assert came == [(0.7, 1), (0.7, 2), (1.1, 3)]
