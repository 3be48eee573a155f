"""One step's plan: which rows are active at which layers, and everything the layers share, computed once.

The rows of a step are all its tokens: first the sequences that run a single token (decode), then the chunks. Between
two layers where somebody enters or leaves the active rows are the same: a *segment*. A segment holds its rows, their
rotations, where their KV is written and the attention plans, so that a layer only multiplies.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from helixd.engine.attention import ChunkAttention, DecodeAttention, Extent, Heads, page_ids
from helixd.engine.kv import KvPool, Page
from helixd.engine.rope import Rope, Rotation
from helixd.layers import LayerRange
from helixd.model.decoder import DecoderConfig


@dataclass(frozen=True, slots=True)
class Item:
    """One sequence's part of a step: positions `[start, start + count)`, at rows `[row, row + count)`."""

    layers: LayerRange
    start: int
    count: int
    row: int
    prompt_tokens: int
    pages: Sequence[Page]


@dataclass(frozen=True, slots=True)
class _Piece:
    """Rows `[start, end)` of a segment's KV go to `offset` of one page."""

    page: Page
    offset: int
    start: int
    end: int


class Segment:
    """Layers `[start, end)` with the same active rows. `rows`: their indices in the step, None for all of them."""

    def __init__(
        self, config: DecoderConfig, pool: KvPool, layers: LayerRange, items: Sequence[Item], rows: Tensor | None,
        rotations: Sequence[Rotation],
    ) -> None:  # fmt: skip
        self.layers = layers
        self.rows = rows
        self._pool = pool
        picked = rotations if rows is None else [Rotation(r.cos[rows], r.sin[rows]) for r in rotations]
        self._rotations = [picked[spec.rope] if spec.rope is not None else None for spec in config.layers]
        self._windows = [spec.window for spec in config.layers]
        # Unscaled scores could overflow float16; there the queries are scaled instead.
        self._query_scale = config.attention_scale if pool.k.dtype == torch.float16 else None
        scale = config.attention_scale if self._query_scale is None else 1.0
        heads = Heads(config.num_heads, config.num_kv_heads, config.head_dim, scale, config.attention_softcap)
        singles = [item for item in items if item.count == 1]
        chunks = [item for item in items if item.count > 1]
        self._singles = len(singles)
        self._spans: list[tuple[int, int]] = []
        self._pieces: list[_Piece] = []
        at = len(singles)
        for item in chunks:
            self._spans.append((at, at + item.count))
            self._pieces.extend(_pieces(item, at, pool.page_tokens))
            at += item.count
        device = pool.k.device
        if singles:
            size = pool.page_tokens
            self._single_pages = page_ids([item.pages[item.start // size] for item in singles], device)
            self._single_offsets = torch.tensor([item.start % size for item in singles], device=device)
        self._decode: dict[int | None, DecodeAttention] = {}
        self._chunks: dict[int | None, list[ChunkAttention]] = {}
        for window in {self._windows[layer] for layer in layers.layers()}:
            if singles:
                extents = [Extent(item.pages, item.start + 1) for item in singles]
                self._decode[window] = DecodeAttention(pool, heads, extents, window)
            self._chunks[window] = [
                ChunkAttention(pool, heads, Extent(item.pages, item.start + item.count), item.start, window)
                for item in chunks
            ]

    def rotation(self, layer: int) -> Rotation | None:
        """cos and sin of the active rows at `layer`."""
        return self._rotations[layer]

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Write the rows' `k`, `v [n, kv, dim]` to the pool."""
        count = self._singles
        pool_k, pool_v = self._pool.k, self._pool.v
        if count:
            ids, offsets = self._single_pages[layer], self._single_offsets
            pool_k[ids, :, :, offsets] = k[:count]
            pool_v[ids, :, offsets] = v[:count]
        for piece in self._pieces:
            page = piece.page.slab.base(layer) + piece.page.number
            end = piece.offset + piece.end - piece.start
            pool_k[page, :, :, piece.offset : end] = k[piece.start : piece.end].permute(1, 2, 0)
            pool_v[page, :, piece.offset : end] = v[piece.start : piece.end].transpose(0, 1)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend with `q [n, heads, dim]`, once the rows' own `k`, `v [n, kv, dim]` are stored: `[n, heads * dim]`."""
        if self._query_scale is not None:
            q = q * self._query_scale
        count = self._singles
        window = self._windows[layer]
        if count:
            decoded = self._decode[window].run(layer, q[:count])
            if not self._spans:
                return decoded
        out = q.new_empty((q.shape[0], q.shape[1] * q.shape[2]))
        if count:
            out[:count] = decoded
        for (start, end), chunk in zip(self._spans, self._chunks[window], strict=True):
            chunk.run(layer, q[start:end], k[start:end], v[start:end], out[start:end])
        return out


def _pieces(item: Item, row: int, page_tokens: int) -> list[_Piece]:
    pieces = []
    position, end = item.start, item.start + item.count
    while position < end:
        stop = min(end, (position // page_tokens + 1) * page_tokens)
        at = row + position - item.start
        page = item.pages[position // page_tokens]
        pieces.append(_Piece(page, position % page_tokens, at, at + stop - position))
        position = stop
    return pieces


def plan_segments(config: DecoderConfig, pool: KvPool, ropes: Sequence[Rope], items: Sequence[Item]) -> list[Segment]:
    """The segments of a step in layer order. `items` are in row order, single tokens first."""
    device = pool.k.device
    positions = torch.cat([torch.arange(item.start, item.start + item.count) for item in items])
    prompts = torch.tensor([item.prompt_tokens for item in items for _ in range(item.count)])
    lengths = torch.maximum(prompts, positions + 1).to(device)
    rotations = [rope.rotation(positions.to(device), lengths) for rope in ropes]
    bounds = sorted({bound for item in items for bound in item.layers.to_pair()})
    segments = []
    for start, end in itertools.pairwise(bounds):
        active = [item for item in items if item.layers.start <= start < item.layers.end]
        if not active:
            continue
        rows = None
        if len(active) < len(items):
            rows = torch.cat([torch.arange(item.row, item.row + item.count) for item in active]).to(device)
        segments.append(Segment(config, pool, LayerRange(start, end), active, rows, rotations))
    return segments
