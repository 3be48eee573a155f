"""What a plan becomes on its way to the workers."""

from typing import Any

from helixd.coordinator.admission import Admission
from helixd.coordinator.epochs import Epochs
from helixd.coordinator.fleet import Fleet, Peer
from helixd.coordinator.planning import ModelSizes
from helixd.ids import Epoch, Incarnation, NodeId, PeerId
from helixd.layers import LayerRange
from helixd.plan.cluster.spec import COORDINATOR
from helixd.plan.plan import Hop, Plan
from helixd.protocol import messages as m
from helixd.protocol import versions
from helixd.protocol.codec import from_frame
from helixd.wire.frames import encode_small_head
from helixd.wire.link import Frame
from helixd.wire.options import WireOptions

LAYERS = 8


class Posted:
    """An outbox that keeps."""

    def __init__(self) -> None:
        self.frames: list[Frame] = []

    def post(self, frame: Frame) -> None:
        self.frames.append(frame)


def fleet_of(count: int) -> tuple[Fleet, list[Posted]]:
    fleet, boxes = Fleet(), []
    for number in range(count):
        name = f"machine-in-some-rack-{number:04}"
        hello = m.Hello(
            versions.PROTOCOL_VERSION, [m.NodeHardware(name, "cpu", "x", 1 << 30, 1 << 30)], "", "", 7071, "x"
        )
        boxes.append(Posted())
        link: Any = object()
        box: Any = boxes[-1]
        fleet.add(Peer(PeerId(name), Incarnation(1), link, box, "192.168.100.100", 7071, hello))
    return fleet, boxes


def test_a_plan_of_many_nodes_fits_into_a_message() -> None:
    fleet, boxes = fleet_of(600)
    names = list(fleet.nodes)
    half = len(names) // 2
    placement = {n: LayerRange(0, 4) if at < half else LayerRange(4, LAYERS) for at, n in enumerate(names)}
    schedule: dict[NodeId, tuple[Hop, ...]] = {COORDINATOR: tuple(Hop(n, 123.456) for n in names[:half])}
    for at in range(half):
        schedule[names[at]] = tuple(Hop(names[half + (at + step) % half], 123.456) for step in range(8))
        schedule[names[half + at]] = (Hop(COORDINATOR, 987.654),)
    sizes = ModelSizes(1 << 20, 0, 0, 8, 8, LAYERS)
    admission = Admission(8, 1.0, 10.0, lambda: ((), ()))
    Epochs(fleet, admission, sizes, Epoch(0), lambda epoch: None).push(Plan(LAYERS, placement, schedule, 1.0))
    frame = boxes[0].frames[-1]
    encode_small_head(frame.kind, frame.body, None, WireOptions().max_body_bytes)
    push = from_frame(frame)
    assert isinstance(push, m.EpochPush)
    mine, *others = push.assignments
    assert [hop for hop, _ in mine.next_hops] == names[half : half + 8]
    assert {a.node: (a.start, a.end) for a in others} == {n: placement[NodeId(n)].to_pair() for n in names[1:]}
    assert len(push.peers) == 8
