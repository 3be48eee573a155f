"""One node's engine: loaded layers, one KV pool, open sequences, and `forward` over any mix of them.

Synchronous and single-threaded: one dedicated thread makes every call. A forward either raises before anything has
changed (bad work, no KV room) or advances every sequence of the batch. Knows no sockets, routes or requests.
"""

import threading
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from helixd.engine.kv import KvPool
from helixd.engine.layer import DecoderLayer
from helixd.engine.loader import TORCH_DTYPES, WeightLoader
from helixd.engine.output import Draw, Head, draw_tokens, score_tokens
from helixd.engine.rope import Rope
from helixd.engine.sequence import Job, OpenSequence, check_work, open_sequence
from helixd.engine.step import Item, plan_segments
from helixd.engine.stopwatch import Stopwatch
from helixd.engine.types import EngineOptions, SequenceSpec, StageResult, StageWork
from helixd.errors import OutOfKv
from helixd.ids import SequenceId
from helixd.layers import LayerRange
from helixd.model.decoder import DecoderConfig
from helixd.model.weights import WeightSource

# Tokens per KV page. Smaller pages waste less of a sequence's last page, larger ones make fewer, longer bmm rows;
# 64 was 10 % faster than 128 in decode at 128 to 256 tokens of context.
PAGE_TOKENS = 64
# A slab is at most this many pages a layer, and small enough that a full range of layers has at least `_MIN_SLABS`.
_MAX_SLAB_PAGES = 32
_MIN_SLABS = 8


class KvExhausted(OutOfKv):
    """The pool cannot take this batch; nothing has changed. `sequence` is the first that did not fit."""

    def __init__(self, sequence: SequenceId, message: str) -> None:
        super().__init__(message)
        self.sequence = sequence


class Engine:
    """See the module. `page_tokens` and `slab_pages` exist for tests of the page logic."""

    def __init__(
        self, config: DecoderConfig, options: EngineOptions, *, page_tokens: int = PAGE_TOKENS,
        slab_pages: int | None = None,
    ) -> None:  # fmt: skip
        self.config = config
        self.options = options
        self._device = torch.device(options.device)
        self._dtype = TORCH_DTYPES[options.dtype]
        self._threads_set_in: int | None = None
        self._layers: dict[int, DecoderLayer] = {}
        self._embedding: Tensor | None = None
        self._head: Head | None = None
        self._sequences: dict[SequenceId, OpenSequence] = {}
        self._ropes = [Rope(spec, self._device, self._dtype) for spec in config.ropes]
        self._embedding_scale = torch.tensor(config.embedding_scale).to(self._dtype).item()
        self._page_tokens = page_tokens
        self._slab_pages = slab_pages
        self._pool = self._new_pool(options.kv_token_layers)
        self._stopwatch = Stopwatch(self._device)

    def _new_pool(self, token_layers: int) -> KvPool:
        config = self.config
        pages = token_layers // self._page_tokens
        slab_pages = self._slab_pages
        if slab_pages is None:
            slab_pages = max(1, min(_MAX_SLAB_PAGES, pages // (_MIN_SLABS * config.num_layers)))
        return KvPool(
            pages=pages,
            slab_pages=slab_pages,
            page_tokens=self._page_tokens,
            kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            num_layers=config.num_layers,
            dtype=self._dtype,
            device=self._device,
        )

    # Weights

    @property
    def loaded(self) -> frozenset[int]:
        """The layers held."""
        return frozenset(self._layers)

    def load(
        self, layers: LayerRange, source: WeightSource, *, embedding: bool, head: bool,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:  # fmt: skip
        """Load what of `layers`, embedding and head is not held yet; what is held stays.

        `progress(done, total)` is called after each part. Raises ModelError naming a missing or misshapen tensor;
        parts loaded before it stay. Raises ValueError for layers the model does not have.
        """
        if layers.end > self.config.num_layers:
            raise ValueError(f"layers {layers} asked for, the model has {self.config.num_layers}")
        self._use_threads()
        loader = WeightLoader(self.config, source, self._device, self._dtype)
        missing = [layer for layer in layers.layers() if layer not in self._layers]
        want_embedding = embedding and self._embedding is None
        want_head = head and self._head is None
        total = len(missing) + want_embedding + want_head
        done = 0

        def step() -> None:
            nonlocal done
            done += 1
            if progress is not None:
                progress(done, total)

        with torch.inference_mode():
            # The largest first: what packing them needs for a moment is then used again for the layers.
            if want_embedding:
                self._embedding = loader.embedding()
                step()
            if want_head:
                self._head = loader.head(self._embedding)
                step()
            for layer in missing:
                self._layers[layer] = loader.layer(layer)
                step()

    def unload(self, layers: LayerRange) -> None:
        """Drop these layers (the embedding with layer 0, the head with the last). Raises ValueError while in use."""
        for sequence in self._sequences.values():
            if sequence.spec.layers.start < layers.end and layers.start < sequence.spec.layers.end:
                raise ValueError(f"layers {layers} are in use by sequence {sequence.spec.id}; close it first")
        for layer in layers.layers():
            self._layers.pop(layer, None)
        if 0 in layers:
            self._embedding = None
        if self.config.num_layers - 1 in layers:
            self._head = None

    # Sequences and KV

    @property
    def kv_capacity_token_layers(self) -> int:
        """The hard limit, in whole pages."""
        return self._pool.pages_total * self._pool.page_tokens

    def set_kv_capacity(self, token_layers: int) -> None:
        """Change the hard limit. What sequences hold stays; a smaller limit takes hold as they give it back."""
        if self._pool.pages_used == 0:
            # The old pool is given back first: both at once may be more than the device has.
            self._pool = self._new_pool(0)
            self._pool = self._new_pool(token_layers)
        else:
            self._pool.resize(token_layers // self._page_tokens)

    @property
    def kv_used_token_layers(self) -> int:
        """What open sequences hold, in whole pages."""
        return self._pool.pages_used * self._pool.page_tokens

    @property
    def kv_pages_used(self) -> int:
        """Pages held, each of one layer."""
        return self._pool.pages_used

    def check_integrity(self) -> None:
        """Verify the KV pool's books against the open sequences. Raises RuntimeError."""
        self._pool.check_integrity(page for sequence in self._sequences.values() for page in sequence.pages)
        for sequence in self._sequences.values():
            if not sequence.length <= len(sequence.pages) * self._pool.page_tokens:
                raise RuntimeError(f"sequence {sequence.spec.id} is longer than its KV pages")

    def open(self, spec: SequenceSpec) -> None:
        """Start a sequence; it takes no KV yet. Raises ValueError if it is open or this engine cannot run it."""
        if spec.id in self._sequences:
            raise ValueError(f"sequence {spec.id} is already open")
        if not self.loaded.issuperset(spec.layers.layers()):
            raise ValueError(f"sequence {spec.id} wants layers {spec.layers}, loaded are {sorted(self.loaded)}")
        if spec.layers.start == 0 and self._embedding is None:
            raise ValueError(f"sequence {spec.id} enters at layer 0, where no embedding is loaded")
        if spec.layers.end == self.config.num_layers and self._head is None:
            raise ValueError(f"sequence {spec.id} leaves the last layer, where no head is loaded")
        self._sequences[spec.id] = open_sequence(self.config, spec)

    def close(self, sequence: SequenceId) -> None:
        """Forget a sequence and free its KV. Unknown ones are ignored."""
        state = self._sequences.pop(sequence, None)
        if state is not None:
            self._pool.release(state.pages)

    def length(self, sequence: SequenceId) -> int:
        """How many positions of an open sequence have KV. Raises KeyError."""
        return self._sequences[sequence].length

    def assume(self, sequence: SequenceId, tokens: int) -> None:
        """Give an open sequence `tokens` positions of zero KV that nobody computed: only for measuring time.

        Raises KeyError for an unknown sequence and MemoryError where the pool has no room.
        """
        state = self._sequences[sequence]
        pages = -(-tokens // self._pool.page_tokens) - len(state.pages)
        if pages > 0:
            state.pages.extend(self._pool.allocate(state.spec.layers, pages))
        state.length = tokens

    # Compute

    @property
    def layers_s(self) -> float:
        """Seconds that the layers of the last `forward` took, embedding and head aside; waits for a GPU."""
        return self._stopwatch.read_s()

    def forward(self, batch: Sequence[StageWork]) -> list[StageResult]:
        """Run the batch; results are in its order.

        A `start` below a sequence's length forgets the KV from there on first (a step may be repeated). Raises, with
        nothing changed: KvExhausted (an OutOfKv) where the pool has no room; ValueError for a gap, work that does
        not fit its sequence, a sequence that is not open or is there twice, or logits that are not finite.
        """
        if not batch:
            return []
        self._use_threads()
        jobs = [self._job(work) for work in batch]
        if len({work.sequence for work in batch}) < len(batch):
            raise ValueError("a sequence is there twice in one batch")
        with torch.inference_mode():
            self._reserve(jobs)
            rows, hidden = self._run(jobs)
            results = self._results(jobs, rows, hidden)
        for job in jobs:
            job.sequence.length = job.end
        return results

    def _job(self, work: StageWork) -> Job:
        sequence = self._sequences.get(work.sequence)
        if sequence is None:
            raise ValueError(f"sequence {work.sequence} is not open")
        return check_work(self.config, self.options.max_context_tokens, sequence, work)

    def _reserve(self, jobs: Sequence[Job]) -> None:
        """Give every job its pages, or raise KvExhausted with nothing changed."""
        size = self._pool.page_tokens
        wanted = [-(-job.end // size) - len(job.sequence.pages) for job in jobs]
        asked: dict[LayerRange, int] = {}
        for job, pages in zip(jobs, wanted, strict=True):
            if pages <= 0:
                continue
            layers = job.sequence.spec.layers
            asked[layers] = asked.get(layers, 0) + pages
            if sum(self._pool.units_for(*ask) for ask in asked.items()) > self._pool.units_free:
                raise KvExhausted(
                    job.work.sequence,
                    f"sequence {job.work.sequence} needs {pages} more KV pages of {size} tokens in layers {layers}; "
                    f"{self.kv_used_token_layers} of {self.kv_capacity_token_layers} token-layers are in use",
                )
        for job, pages in zip(jobs, wanted, strict=True):
            held = job.sequence.pages
            if pages < 0:
                self._pool.release(held[pages:])
                del held[pages:]
            elif pages > 0:
                held.extend(self._pool.allocate(job.sequence.spec.layers, pages, held[-1] if held else None))
            job.sequence.length = job.work.start

    def _run(self, jobs: Sequence[Job]) -> tuple[list[int], Tensor]:
        """Every job through its layers: the first row of each job, and the hidden states `[rows, hidden_size]`."""
        self._stopwatch.start()
        # Single tokens in the order of their KV in memory: their attention then needs less gathering.
        order = sorted(range(len(jobs)), key=lambda index: jobs[index].row_key)
        rows = [0] * len(jobs)
        items = []
        row = 0
        for index in order:
            job, spec = jobs[index], jobs[index].sequence.spec
            items.append(Item(spec.layers, job.work.start, job.count, row, spec.prompt_tokens, job.sequence.pages))
            rows[index] = row
            row += job.count
        hidden = self._inputs([jobs[index].work for index in order])
        last = self.config.num_layers - 1
        read = _read_rows((jobs[index] for index in order), last + 1, self._device)
        for segment in plan_segments(self.config, self._pool, self._ropes, items):
            active = hidden if segment.rows is None else hidden[segment.rows]
            target = segment.rows
            for layer in segment.layers.layers():
                keep = read if layer == last else None
                active = self._layers[layer](active, segment, keep)
                if keep is not None:
                    target = keep if segment.rows is None else segment.rows[keep]
            if target is None:
                hidden = active
            else:
                hidden[target] = active
        self._stopwatch.stop()
        return rows, hidden

    def _inputs(self, works: Sequence[StageWork]) -> Tensor:
        """The works' rows together, `[rows, hidden_size]`, owned by the caller."""
        ids = [token for work in works for token in work.token_ids or ()]
        embedded = torch.empty(0)
        if ids and self._embedding is not None:
            embedded = self._embedding[torch.tensor(ids, device=self._device)]
            if self._embedding_scale != 1.0:
                embedded = embedded * self._embedding_scale
            if all(work.hidden is None for work in works):
                return embedded
        parts = []
        at = 0
        for work in works:
            if work.hidden is not None:
                parts.append(work.hidden.to(self._device, self._dtype))
            else:
                count = len(work.token_ids or ())
                parts.append(embedded[at : at + count])
                at += count
        return torch.cat(parts)

    def _results(self, jobs: Sequence[Job], rows: Sequence[int], hidden: Tensor) -> list[StageResult]:
        """What each job hands on, from its rows of the step's final hidden states."""
        draws = {
            index: Draw(rows[index] + job.count - 1, job.end, job.sequence.sampler)
            for index, job in enumerate(jobs)
            if job.work.sample and job.sequence.sampler is not None
        }
        head = self._head
        drawn = {} if head is None else dict(zip(draws, draw_tokens(head, hidden, list(draws.values())), strict=True))
        results = []
        for index, (job, row) in enumerate(zip(jobs, rows, strict=True)):
            own = hidden[row : row + job.count]
            if job.sequence.spec.layers.end < self.config.num_layers:
                results.append(StageResult(job.work.sequence, hidden=own))
                continue
            scores = None
            if job.work.score is not None and head is not None:
                sampling = job.sequence.spec.sampling
                top = 0 if sampling is None else sampling.logprobs or 0
                scores = score_tokens(head, own, job.work.score, top)
            token = drawn.get(index)
            results.append(
                StageResult(
                    job.work.sequence,
                    token=None if token is None else token.token,
                    logprobs=None if token is None else token.logprobs,
                    scores=scores,
                )
            )
        return results

    def _use_threads(self) -> None:
        """torch's thread count belongs to the calling thread, so it is set where the work is done."""
        here = threading.get_ident()
        if self.options.threads and self._device.type == "cpu" and self._threads_set_in != here:
            torch.set_num_threads(self.options.threads)
            self._threads_set_in = here


def _read_rows(jobs: Iterable[Job], num_layers: int, device: torch.device) -> Tensor | None:
    """Of the rows that go through the last layer, in order, those that a token is drawn from or scored after."""
    rows: list[int] = []
    at = 0
    for job in jobs:
        if job.sequence.spec.layers.end < num_layers:
            continue
        end = at + job.count
        if job.work.score is not None:
            rows.extend(range(at, end))
        elif job.work.sample:
            rows.append(end - 1)
        at = end
    return None if len(rows) == at else torch.tensor(rows, dtype=torch.int64, device=device)
