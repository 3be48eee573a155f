"""Attention over the KV pool: one plan per step for decode rows, one per prefill chunk, used by every layer.

Grouped queries are folded into rows: a KV head serves `heads / kv_heads` query rows of one bmm. Decode works in page
space: the pages of all rows, in the order they lie in memory, are multiplied run by run without copying any KV; only
the scores, `head_dim / group` times smaller, are gathered per row for an exact softmax. A chunk brings its own and
the earlier keys together once and goes through them in blocks of queries. A window hides all but the last `window`
keys; pages that it hides wholly are not touched.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from helixd.engine.kv import KvPool, Page

# Query tokens per block of a chunk: larger wastes work above the diagonal, smaller has more calls (measured on CPUs).
BLOCK_TOKENS = {torch.float32: 64, torch.float16: 128, torch.bfloat16: 128}


class Heads(NamedTuple):
    """The shape of attention: `queries` and `kv` heads of `dim`; `scale` and, if any, `softcap` of their scores."""

    queries: int
    kv: int
    dim: int
    scale: float
    softcap: float | None


class Extent(NamedTuple):
    """Where a sequence's keys lie: `pages` from position 0 on, `length` keys in all."""

    pages: Sequence[Page]
    length: int


class _Run(NamedTuple):
    """Neighbouring pages of a slab: `first.number` to `+ pages`, at `[at, at + pages)` of the plan's pages."""

    first: Page
    at: int
    pages: int


class DecodeAttention:
    """One query token for each of the given extents, whose last key is the token's own (already in the pool)."""

    def __init__(self, pool: KvPool, heads: Heads, extents: Sequence[Extent], window: int | None) -> None:
        self._pool = pool
        self._heads = heads
        tokens = pool.page_tokens
        firsts = [0 if window is None else max(0, extent.length - window) // tokens for extent in extents]
        counts = [-(-extent.length // tokens) - first for extent, first in zip(extents, firsts, strict=True)]
        self._rows = len(extents)
        self._width = max(counts)
        owned = sorted(
            (id(page.slab), page.number, row, column)
            for row, (extent, first, count) in enumerate(zip(extents, firsts, counts, strict=True))
            for column, page in enumerate(extent.pages[first : first + count])
        )
        pages = {(id(page.slab), page.number): page for extent in extents for page in extent.pages}
        self._runs: list[_Run] = []
        owners: list[int] = []
        slots: list[int] = []
        table = [[-1] * self._width for _ in extents]
        for slab, index, row, column in owned:
            last = self._runs[-1] if self._runs else None
            gap = 2 if last is None or id(last.first.slab) != slab else index - last.first.number - last.pages
            if last is not None and gap <= 1:  # one foreign page costs less than another pair of calls
                owners.extend([row] * gap)
                slots.extend([0] * gap)
                self._runs[-1] = last._replace(pages=last.pages + gap + 1)
            else:
                self._runs.append(_Run(pages[slab, index], len(owners), 1))
            table[row][column] = len(owners)
            owners.append(row)
            slots.append(row * self._width + column)
        self._pages = len(owners)
        device = pool.k.device
        self._aligned = [slot for line in table for slot in line] == list(range(self._rows * self._width))
        if not self._aligned:
            # Slots without a page read the extra last page of the scores and outputs, which stays zero.
            flat = [self._pages if slot < 0 else slot for line in table for slot in line]
            self._owners = torch.tensor(owners, device=device)
            self._slots = torch.tensor(slots, device=device)
            self._table = torch.tensor(flat, device=device)
        self._mask = self._make_mask(extents, firsts, window)
        dtype = pool.k.dtype
        width = (self._pages + 1) * heads.queries
        self._scores = torch.zeros((width * tokens), dtype=dtype, device=device).view(-1, heads.queries, tokens)
        self._outputs = torch.zeros((width * heads.dim), dtype=dtype, device=device).view(-1, heads.queries, heads.dim)
        self._wide = torch.empty((self._rows, heads.queries, self._width, tokens), dtype=dtype, device=device)

    def _make_mask(self, extents: Sequence[Extent], firsts: list[int], window: int | None) -> Tensor:
        """`[rows, 1, width, page_tokens]`, 0 where a key is seen and -inf elsewhere."""
        tokens = self._pool.page_tokens
        end = torch.tensor([extent.length for extent in extents]).view(-1, 1)
        position = torch.tensor(firsts).view(-1, 1) * tokens + torch.arange(self._width * tokens)
        hidden = position >= end
        if window is not None:
            hidden |= position < end - window
        mask = torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf"))
        return mask.view(self._rows, 1, self._width, tokens).to(self._pool.k.device, self._pool.k.dtype)

    def run(self, layer: int, q: Tensor) -> Tensor:
        """`q [rows, heads, dim]` to `[rows, heads * dim]`."""
        rows, width, tokens = self._rows, self._width, self._pool.page_tokens
        queries, kv, dim, scale, softcap = self._heads
        group = queries // kv
        count = self._pages
        if not self._aligned:
            q = q.index_select(0, self._owners)
        elif width > 1:
            q = q.unsqueeze(1).expand(rows, width, queries, dim).reshape(count, queries, dim)
        per_kv = q.reshape(count * kv, group, dim)
        flat = self._scores.view(-1, group, tokens)
        for first, at, pages in self._runs:
            base = first.slab.base(layer) + first.number
            keys = self._pool.k[base : base + pages].view(-1, dim, tokens)
            torch.bmm(per_kv[at * kv : (at + pages) * kv], keys, out=flat[at * kv : (at + pages) * kv])
        scores = self._scores[:count] if self._aligned else self._scores.index_select(0, self._table)
        if softcap is not None:
            scores, scale = torch.tanh(scores * (scale / softcap)), softcap
        by_row = scores.view(rows, width, queries, tokens).transpose(1, 2)
        torch.add(self._mask, by_row, alpha=scale, out=self._wide)
        weights = torch.softmax(self._wide.view(rows, queries, width * tokens), -1)
        if width > 1:
            weights = weights.view(rows, queries, width, tokens).transpose(1, 2).reshape(-1, queries, tokens)
        if not self._aligned:
            weights = weights.reshape(-1, queries, tokens).index_select(0, self._slots)
        weights = weights.reshape(count * kv, group, tokens)
        outputs = self._outputs.view(-1, group, dim)
        for first, at, pages in self._runs:
            base = first.slab.base(layer) + first.number
            values = self._pool.v[base : base + pages].view(-1, tokens, dim)
            torch.bmm(weights[at * kv : (at + pages) * kv], values, out=outputs[at * kv : (at + pages) * kv])
        if self._aligned:
            gathered = self._outputs[:count]
            if width == 1:
                return gathered.reshape(rows, queries * dim)
        else:
            gathered = self._outputs.index_select(0, self._table)
        return gathered.view(rows, width, queries * dim).sum(1)


class _Block(NamedTuple):
    """Query tokens `[start, end)` of a chunk against its keys `[first, last)`; `mask [tokens, 1, keys]`."""

    start: int
    end: int
    first: int
    last: int
    mask: Tensor


class ChunkAttention:
    """A run of query tokens of one sequence: positions `[start, start + n)` of an extent that ends with them."""

    def __init__(self, pool: KvPool, heads: Heads, extent: Extent, start: int, window: int | None) -> None:
        self._pool = pool
        self._heads = heads
        self._fresh = start == 0
        first_page = 0 if window is None else max(0, start + 1 - window) // pool.page_tokens
        origin = first_page * pool.page_tokens
        pages = extent.pages[first_page : -(-extent.length // pool.page_tokens)]
        self._page_ids = None if self._fresh else page_ids(pages, pool.k.device)
        self._length = extent.length - origin
        self._blocks: list[_Block] = []
        size = BLOCK_TOKENS[pool.k.dtype]
        for at in range(start, extent.length, size):
            stop = min(at + size, extent.length)
            first = origin if window is None else max(origin, at + 1 - window)
            query = torch.arange(at, stop).view(-1, 1)
            key = torch.arange(first, stop)
            hidden = key > query
            if window is not None:
                hidden |= key <= query - window
            mask = torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf")).unsqueeze(1)
            mask = mask.to(pool.k.device, pool.k.dtype)
            self._blocks.append(_Block(at - start, stop - start, first - origin, stop - origin, mask))

    def run(self, layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        """`q [n, heads, dim]`, own `k`, `v [n, kv, dim]`, also in the pool, into `out [n, heads * dim]`."""
        queries, kv, dim, scale, softcap = self._heads
        group = queries // kv
        keys, values = (k.permute(1, 2, 0), v.transpose(0, 1)) if self._page_ids is None else self._gather(layer)
        rows = q.view(-1, kv, group, dim).transpose(0, 1).reshape(kv, -1, dim)
        target = out.view(-1, kv, group, dim)
        for start, end, first, last, mask in self._blocks:
            scores = torch.bmm(rows[:, start * group : end * group], keys[:, :, first:last])
            if softcap is not None:
                scores = scores.mul_(scale / softcap).tanh_()
            by_token = scores.view(kv, end - start, group, last - first)
            torch.add(mask, by_token, alpha=scale if softcap is None else softcap, out=by_token)
            mixed = torch.bmm(torch.softmax(scores, -1), values[:, first:last])
            target[start:end] = mixed.view(kv, end - start, group, dim).transpose(0, 1)

    def _gather(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys `[kv, dim, length]` and values `[kv, length, dim]` of the extent."""
        assert self._page_ids is not None
        kv, dim = self._heads.kv, self._heads.dim
        ids = self._page_ids[layer]
        keys = self._pool.k.index_select(0, ids).permute(1, 2, 0, 3).reshape(kv, dim, -1)
        values = self._pool.v.index_select(0, ids).transpose(0, 1).reshape(kv, -1, dim)
        return keys[:, :, : self._length], values[:, : self._length]


def page_ids(pages: Sequence[Page], device: torch.device) -> list[Tensor]:
    """For each layer of the model the pool indices `[n]` of these pages (meaningless outside a page's layers)."""
    bases = torch.stack([page.slab.bases_by_layer for page in pages], 1)
    return list((bases + torch.tensor([page.number for page in pages])).to(device).unbind(0))
