"""Any bytes where frames, hellos and setups are expected: refused by name, and no multiple of them in memory."""

import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.budget import examples
from tests.fuzz.target import BODY_BYTES, BULK, HELLO, SETUP, SMALL, one_input, seeds

KINDS = st.sampled_from([SMALL, BULK, HELLO, SETUP])
MEMORY_BYTES = 16 << 20
"""Far more than the largest message that is understood takes; far less than a decoder that believes lengths would."""


@given(KINDS, st.binary(max_size=400))
@settings(max_examples=examples(500, 50_000), deadline=None)
def test_any_bytes_are_understood_or_refused(kind: bytes, rest: bytes) -> None:
    one_input(kind + rest)


@given(st.sampled_from(seeds()), st.data())
@settings(max_examples=examples(500, 50_000), deadline=None)
def test_a_changed_message_is_understood_or_refused(seed: bytes, data: st.DataObject) -> None:
    changed = bytearray(seed)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(1, len(changed)))
        changed[at : at + data.draw(st.integers(0, 8))] = data.draw(st.binary(max_size=8))
    one_input(bytes(changed))


@pytest.mark.parametrize("kind", [SMALL, BULK, HELLO, SETUP])
@pytest.mark.parametrize(
    "unit",
    [
        b"\x80", b"\x90", b"\xc0", b"\x91", b"\x81\xa0",  # empty maps and lists, nils, depth, maps in maps
        b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff",  # lengths
        b"\xc9\xff\xff\xff\xff\x01",
    ],
)  # fmt: skip
@pytest.mark.parametrize("size", [16, 4096, BODY_BYTES - 64, BODY_BYTES + 64])
def test_memory_is_bounded_whatever_is_claimed(kind: bytes, unit: bytes, size: int) -> None:
    rest = unit * (size // len(unit))
    heads = [b"", len(rest).to_bytes(4, "little"), len(rest).to_bytes(4, "big"), b"\x93\x0c", b"\xdc\xff\xff"]
    tracemalloc.start()
    try:
        for head in heads:
            one_input(kind + head + rest)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < MEMORY_BYTES
