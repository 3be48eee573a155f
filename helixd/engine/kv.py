"""The KV pool: one preallocated tensor of pages, charged for exactly the layers a sequence uses.

A *page* holds `page_tokens` tokens of one sequence in one layer: K transposed `[kv_heads, head_dim, page_tokens]`
(so that decode is a plain bmm), V `[kv_heads, page_tokens, head_dim]`. `slab_pages` pages that lie side by side are a
*unit*. A *slab* gives one unit to each layer of a range; sequences of the same range share slabs, so one page table
serves all their layers, and at any layer neighbouring pages of a slab are one contiguous batch for bmm: nothing is
copied to attend over it. Units are interchangeable, so ranges that start or end elsewhere take room from each other
freely and nothing fragments but the last slab of a range.

Decides where KV lies and what is free. Knows nothing of tokens, masks or time.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from helixd.layers import LayerRange


@dataclass(slots=True, eq=False)
class Slab:
    """`slab_pages` pages in each layer of `layers`. `bases[l - start]` is the pool index of its page 0 at layer l.

    `free` is a bit mask of the pages not in use.
    """

    layers: LayerRange
    bases: tuple[int, ...]
    free: int
    bases_by_layer: torch.Tensor

    def base(self, layer: int) -> int:
        """Pool index of page 0 at `layer`."""
        return self.bases[layer - self.layers.start]


class Page(NamedTuple):
    """The same page number of a slab, in all of the slab's layers."""

    slab: Slab
    number: int


class KvPool:
    """Pages of K and V for one device. Not thread-safe: one thread owns it.

    `k` is `[pages, kv_heads, head_dim, page_tokens]`, `v` is `[pages, kv_heads, page_tokens, head_dim]`.
    """

    def __init__(
        self, *, pages: int, slab_pages: int, page_tokens: int, kv_heads: int, head_dim: int, num_layers: int,
        dtype: torch.dtype, device: torch.device,
    ) -> None:  # fmt: skip
        self.page_tokens = page_tokens
        self.slab_pages = slab_pages
        self.units = pages // slab_pages
        self._num_layers = num_layers
        self._device = device
        self._full = (1 << slab_pages) - 1
        self._free_units = list(range(self.units - 1, -1, -1))
        self._slabs: dict[tuple[int, int], list[Slab]] = {}
        self._pages_used = 0
        count = self.units * slab_pages
        self.k = torch.empty((count, kv_heads, head_dim, page_tokens), dtype=dtype, device=device)
        self.v = torch.empty((count, kv_heads, page_tokens, head_dim), dtype=dtype, device=device)

    @property
    def pages_total(self) -> int:
        """How many pages there are, each of one layer."""
        return self.units * self.slab_pages

    @property
    def pages_used(self) -> int:
        """Pages held by sequences, counted in every layer."""
        return self._pages_used

    def resize(self, pages: int) -> None:
        """Have `pages` pages from now on. Pages in use stay where they are: of a smaller pool, those beyond its end
        are not given out again, and their memory goes with the next resize. So does what could not be copied to become
        smaller. Raises MemoryError or RuntimeError if there is no memory to become larger; then as many as before
        can be given out.
        """
        units = pages // self.slab_pages
        in_use = max(
            (base // self.slab_pages + 1 for slabs in self._slabs.values() for slab in slabs for base in slab.bases),
            default=0,
        )
        count = max(units, in_use) * self.slab_pages
        # One after the other: only one of them is there twice for a moment.
        self.k = _resized(self.k, count)
        self.v = _resized(self.v, count)
        taken = {base // self.slab_pages for slabs in self._slabs.values() for slab in slabs for base in slab.bases}
        self.units = units
        self._free_units = [unit for unit in range(units - 1, -1, -1) if unit not in taken]

    def allocatable(self, layers: LayerRange) -> int:
        """How many more pages `allocate` could give to `layers` now (each in all of these layers)."""
        here = sum(slab.free.bit_count() for slab in self._slabs.get(layers.to_pair(), ()))
        return here + len(self._free_units) // len(layers) * self.slab_pages

    def units_for(self, layers: LayerRange, pages: int) -> int:
        """How many free units `allocate(layers, pages)` would take."""
        here = sum(slab.free.bit_count() for slab in self._slabs.get(layers.to_pair(), ()))
        return -(-max(0, pages - here) // self.slab_pages) * len(layers)

    @property
    def units_free(self) -> int:
        """Units that belong to no slab."""
        return len(self._free_units)

    def allocate(self, layers: LayerRange, pages: int, after: Page | None = None) -> list[Page]:
        """`pages` zeroed pages in all of `layers`, beside `after` where possible. Raises MemoryError, taking none."""
        if pages > self.allocatable(layers):
            raise MemoryError(f"{pages} KV pages for layers {layers} asked for, {self.allocatable(layers)} free")
        taken: list[Page] = []
        for _ in range(pages):
            after = self._take(layers, after)
            taken.append(after)
        self._pages_used += pages * len(layers)
        if taken:
            # Stale values could be NaN or infinite, and those pass through a mask.
            index = torch.tensor(
                [base + page.number for page in taken for base in page.slab.bases], device=self._device
            )
            self.k.index_fill_(0, index, 0)
            self.v.index_fill_(0, index, 0)
        return taken

    def release(self, pages: Iterable[Page]) -> None:
        """Give pages back; each must be in use."""
        for slab, index in pages:
            if slab.free >> index & 1:
                raise ValueError(f"KV page {index} of layers {slab.layers} is already free")
            slab.free |= 1 << index
            self._pages_used -= len(slab.layers)
            if slab.free == self._full:
                self._slabs[slab.layers.to_pair()].remove(slab)
                freed = (base // self.slab_pages for base in slab.bases)
                self._free_units.extend(unit for unit in freed if unit < self.units)

    def _take(self, layers: LayerRange, after: Page | None) -> Page:
        if after is not None and after.slab.free >> (after.number + 1) & 1:
            slab, index = after.slab, after.number + 1
        else:
            slabs = self._slabs.setdefault(layers.to_pair(), [])
            found = next((slab for slab in slabs if slab.free), None)
            slab = found if found is not None else self._open_slab(layers)
            index = (slab.free & -slab.free).bit_length() - 1
        slab.free &= ~(1 << index)
        return Page(slab, index)

    def _open_slab(self, layers: LayerRange) -> Slab:
        bases = tuple(self._free_units.pop() * self.slab_pages for _ in layers.layers())
        by_layer = torch.zeros(self._num_layers, dtype=torch.int64)
        by_layer[layers.start : layers.end] = torch.tensor(bases)
        slab = Slab(layers, bases, self._full, by_layer)
        self._slabs[layers.to_pair()].append(slab)
        return slab

    def check_integrity(self, held: Iterable[Page]) -> None:
        """Verify that free + used = total and that `held` are exactly the used pages. Raises RuntimeError."""
        masks = {id(slab): self._full & ~slab.free for slabs in self._slabs.values() for slab in slabs}
        for slab, index in held:
            if not masks.get(id(slab), 0) >> index & 1:
                raise RuntimeError(f"KV page {index} of layers {slab.layers} is held twice or not allocated")
            masks[id(slab)] &= ~(1 << index)
        if any(masks.values()):
            raise RuntimeError("KV pages are allocated that no sequence holds")
        slabs = [slab for group in self._slabs.values() for slab in group]
        units = self._free_units + [base // self.slab_pages for slab in slabs for base in slab.bases]
        if sorted(unit for unit in units if unit < self.units) != list(range(self.units)):
            raise RuntimeError("KV units are lost or held twice")
        used = sum((self._full & ~slab.free).bit_count() * len(slab.layers) for slab in slabs)
        if used != self._pages_used:
            raise RuntimeError(f"{self._pages_used} KV pages counted as used, {used} are")


def _resized(tensor: torch.Tensor, pages: int) -> torch.Tensor:
    """The same pages in a tensor of another length (the first dimension); itself if it cannot become shorter."""
    had = tensor.shape[0]
    if pages == had:
        return tensor
    try:
        resized = _empty_like(tensor, pages)
    except (MemoryError, RuntimeError):
        if pages > had:
            raise
        return tensor
    kept = min(pages, had)
    resized[:kept] = tensor[:kept]
    return resized


def _empty_like(tensor: torch.Tensor, pages: int) -> torch.Tensor:
    return tensor.new_empty((pages, *tensor.shape[1:]))
