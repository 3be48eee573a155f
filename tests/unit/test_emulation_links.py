"""A shaped link on a virtual clock: bytes, then latency; who is urgent goes first, nobody is lost."""

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helixd.emulation.links import GRAIN_S, Lane
from tests.vtime.loop import running

Message = tuple[float, str, int, bool]
BANDWIDTH, LATENCY_S = 1000.0, 0.5


def crossings(*messages: Message) -> dict[str, float]:
    """When each message (seconds, name, bytes, urgent) arrives, in the order of arrival."""
    with running(1) as loop:
        arrived: dict[str, float] = {}
        began_s = loop.time()

        async def run() -> None:
            lane = Lane(BANDWIDTH, LATENCY_S, lambda: None)
            for at_s, name, size, urgent in messages:
                await asyncio.sleep(began_s + at_s - loop.time())
                lane.carry(
                    size, lambda name=name: arrived.update({name: loop.time() - began_s}), urgent=urgent
                )  # fmt: skip
            while lane.waiting_bytes:
                await asyncio.sleep(0.05)

        loop.run_until_complete(run())
        return arrived


def test_one_message_at_a_time_for_its_bytes_and_the_latency_after() -> None:
    found = crossings((0.0, "a", 1000, False), (0.0, "b", 500, False), (4.0, "c", 100, False))
    assert list(found.values()) == pytest.approx([1.5, 2.0, 4.6])


def test_decode_rows_go_before_prefill_that_waits_but_not_before_what_is_crossing() -> None:
    found = crossings((0.0, "first", 1000, False), (0.1, "second", 1000, False), (0.2, "decode", 10, True))
    assert list(found) == ["first", "decode", "second"]
    assert list(found.values()) == pytest.approx([1.5, 1.51, 2.51])


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(0, 3), st.integers(1, 2000), st.booleans()), min_size=1, max_size=12
    )
)  # fmt: skip
def test_all_arrive_each_kind_in_order_no_sooner_than_the_link_allows(sent: list[tuple[float, int, bool]]) -> None:
    sent.sort(key=lambda each: each[0])
    messages = [(at_s, str(number), size, urgent) for number, (at_s, size, urgent) in enumerate(sent)]
    found = crossings(*messages)
    assert sorted(found, key=int) == [name for _, name, _, _ in messages]
    for kind in (True, False):
        ranks = [int(name) for name in found if sent[int(name)][2] == kind]
        assert ranks == sorted(ranks)
    for at_s, name, size, _ in messages:
        assert found[name] >= at_s + size / BANDWIDTH + LATENCY_S - 1e-6
    total_s = sum(size for _, size, _ in sent) / BANDWIDTH
    assert max(found.values()) <= sent[-1][0] + total_s + LATENCY_S + GRAIN_S * len(sent) + 0.01
