"""The KV pool: charged by layers used, pages free + used = total, a hard limit, nothing changed by a refusal."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helixd.engine import kv
from helixd.engine.kv import KvPool, Page
from helixd.layers import LayerRange


def make_pool(pages: int = 48, slab_pages: int = 2) -> KvPool:
    return KvPool(
        pages=pages, slab_pages=slab_pages, page_tokens=4, kv_heads=1, head_dim=2, num_layers=6, dtype=torch.float32,
        device=torch.device("cpu"),
    )  # fmt: skip


def test_a_page_is_charged_once_for_each_layer_used() -> None:
    pool = make_pool()
    held = pool.allocate(LayerRange(0, 6), 1) + pool.allocate(LayerRange(4, 6), 3)
    assert pool.pages_used == 6 + 3 * 2
    pool.check_integrity(held)
    pool.release(held)
    assert pool.pages_used == 0
    pool.check_integrity([])


def test_room_freed_by_one_range_serves_another() -> None:
    pool = make_pool(pages=24)
    first = pool.allocate(LayerRange(0, 6), 4)
    assert pool.allocatable(LayerRange(3, 6)) == 0
    pool.release(first)
    assert len(pool.allocate(LayerRange(3, 6), 8)) == 8
    assert pool.allocatable(LayerRange(0, 6)) == 0


def test_both_sides_of_the_limit() -> None:
    pool = make_pool(pages=24)
    pool.allocate(LayerRange(0, 6), 4)
    with pytest.raises(MemoryError, match="0 free"):
        pool.allocate(LayerRange(0, 6), 1)
    assert pool.pages_used == 24


def test_neighbouring_pages_are_preferred() -> None:
    pool = make_pool(slab_pages=4)
    one = pool.allocate(LayerRange(0, 2), 1)
    pages = pool.allocate(LayerRange(0, 2), 2, after=one[-1])
    assert [page.number for page in one + pages] == [0, 1, 2]
    assert len({id(page.slab) for page in one + pages}) == 1


def test_given_pages_are_zero_in_all_their_layers_even_after_nan() -> None:
    pool = make_pool()
    pool.k.fill_(float("nan"))
    pool.v.fill_(float("nan"))
    [page] = pool.allocate(LayerRange(1, 4), 1)
    for layer in range(1, 4):
        assert bool((pool.k[page.slab.base(layer) + page.number] == 0).all())
        assert bool((pool.v[page.slab.base(layer) + page.number] == 0).all())


def test_releasing_twice_and_lost_pages_are_found() -> None:
    pool = make_pool()
    held = pool.allocate(LayerRange(0, 6), 2)
    with pytest.raises(RuntimeError, match="no sequence holds"):
        pool.check_integrity(held[:1])
    with pytest.raises(RuntimeError, match="held twice"):
        pool.check_integrity([*held, held[0]])
    pool.release(held[:1])
    with pytest.raises(ValueError, match="already free"):
        pool.release(held[:1])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([(0, 6), (2, 6), (3, 6), (0, 3)]), st.integers(0, 5), st.booleans())))
def test_books_hold_after_any_history(steps: list[tuple[tuple[int, int], int, bool]]) -> None:
    pool = make_pool()
    held: list[Page] = []
    for pair, count, release in steps:
        if release:
            pool.release(held[:count])
            del held[:count]
        elif count <= pool.allocatable(LayerRange.of(pair)):
            got = pool.allocate(LayerRange.of(pair), count)
            assert len({(id(page.slab), page.number) for page in held + got}) == len(held) + count
            held += got
        pool.check_integrity(held)
        assert pool.pages_used == sum(len(page.slab.layers) for page in held) <= pool.pages_total
    pool.release(held)
    assert pool.pages_used == 0
    assert pool.allocatable(LayerRange(0, 6)) == pool.pages_total // 6


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([(0, 6), (2, 6), (3, 6), (0, 3)]),
            st.integers(0, 5),
            st.sampled_from(["take", "give", "size"]),
        )
    )
)
def test_what_pages_hold_outlasts_every_other_size_of_the_pool(steps: list[tuple[tuple[int, int], int, str]]) -> None:
    pool = make_pool()
    held: list[tuple[Page, float]] = []
    for number, (pair, count, what) in enumerate(steps):
        if what == "give":
            pool.release(page for page, _ in held[:count])
            del held[:count]
        elif what == "size":
            pool.resize(12 * count)
            assert pool.pages_total == 12 * count
        elif count <= pool.allocatable(LayerRange.of(pair)):
            for page in pool.allocate(LayerRange.of(pair), count):
                held.append((page, float(number)))
                for base in page.slab.bases:
                    pool.k[base + page.number] = number
                    pool.v[base + page.number] = -number
        pool.check_integrity(page for page, _ in held)
        for page, value in held:
            for base in page.slab.bases:
                assert bool((pool.k[base + page.number] == value).all())
                assert bool((pool.v[base + page.number] == -value).all())
    pool.release(page for page, _ in held)
    pool.resize(24)
    assert pool.pages_used == 0
    assert pool.k.shape[0] == pool.v.shape[0] == 24
    assert pool.allocatable(LayerRange(0, 6)) == 4


def test_a_pool_that_cannot_be_copied_to_become_smaller_is_smaller_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A full device has no memory for the copy; what is given out is limited, and the next resize tries again."""
    pool = make_pool()
    pages = pool.allocate(LayerRange(0, 6), 1)
    large = pool.k.shape[0]

    def full(tensor: torch.Tensor, pages: int) -> torch.Tensor:
        raise torch.OutOfMemoryError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(kv, "_empty_like", full)
        pool.resize(12)
        assert (pool.pages_total, pool.k.shape[0]) == (12, large)
        pool.check_integrity(pages)
        with pytest.raises(torch.OutOfMemoryError):
            pool.resize(large + 12)
        assert pool.pages_total == 12
    pool.release(pages)
    pool.resize(24)
    assert pool.pages_total == pool.k.shape[0] == pool.v.shape[0] == 24
