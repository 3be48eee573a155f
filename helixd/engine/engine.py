"""One node's engine: loaded layers, one KV pool, open sequences, and `forward` over any mix of them.

Synchronous and single-threaded: one dedicated thread makes every call. A forward either raises before anything has
changed (bad work, no KV room) or advances every sequence of the batch. Knows no sockets, routes or requests.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from helixd.engine.kv import KvPool, Page
from helixd.engine.layer import DecoderLayer
from helixd.engine.loader import TORCH_DTYPES, Head, WeightLoader
from helixd.engine.rope import Rope
from helixd.engine.sampling import SCORE_ROWS, SamplerState, sample, token_logprobs
from helixd.engine.step import Item, plan_segments
from helixd.engine.types import EngineOptions, SequenceSpec, StageResult, StageWork
from helixd.errors import OutOfKv
from helixd.ids import SequenceId
from helixd.layers import LayerRange
from helixd.model.decoder import DecoderConfig
from helixd.model.weights import WeightSource
from helixd.sampling import TokenLogprobs

# Tokens per KV page. Smaller pages waste less of a sequence's last page, larger ones make fewer, longer bmm rows.
PAGE_TOKENS = 128
# A slab is at most this many pages a layer, and small enough that a full range of layers has at least `_MIN_SLABS`.
_MAX_SLAB_PAGES = 32
_MIN_SLABS = 8


class KvExhausted(OutOfKv):
    """The pool cannot take this batch; nothing has changed. `sequence` is the first that did not fit."""

    def __init__(self, sequence: SequenceId, message: str) -> None:
        super().__init__(message)
        self.sequence = sequence


@dataclass(slots=True, eq=False)
class _Sequence:
    """An open sequence: `length` tokens of KV are valid, in `pages`."""

    spec: SequenceSpec
    sampler: SamplerState | None
    length: int = 0
    pages: list[Page] = field(default_factory=list)


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    """One work item with its sequence and token count."""

    work: StageWork
    sequence: _Sequence
    count: int


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
        self._sequences: dict[SequenceId, _Sequence] = {}
        self._ropes = [Rope(spec, self._device, self._dtype) for spec in config.ropes]
        self._embedding_scale = torch.tensor(config.embedding_scale).to(self._dtype).item()
        pages = options.kv_token_layers // page_tokens
        if slab_pages is None:
            slab_pages = max(1, min(_MAX_SLAB_PAGES, pages // (_MIN_SLABS * config.num_layers)))
        self._pool = KvPool(
            pages=pages,
            slab_pages=slab_pages,
            page_tokens=page_tokens,
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
            if want_embedding:
                self._embedding = loader.embedding()
                step()
            for layer in missing:
                self._layers[layer] = loader.layer(layer)
                step()
            if want_head:
                self._head = loader.head(self._embedding)
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
        if spec.sampling is not None and any(not self._is_token(token) for token, _ in spec.sampling.logit_bias):
            raise ValueError(f"sequence {spec.id}: logit_bias names a token outside the vocabulary")
        if not all(map(self._is_token, spec.prefix)):
            raise ValueError(f"sequence {spec.id}: the prefix has a token outside the vocabulary")
        sampler = None if spec.sampling is None else SamplerState(spec.sampling, spec.prompt_tokens, spec.prefix)
        self._sequences[spec.id] = _Sequence(spec, sampler)

    def close(self, sequence: SequenceId) -> None:
        """Forget a sequence and free its KV. Unknown ones are ignored."""
        state = self._sequences.pop(sequence, None)
        if state is not None:
            self._pool.release(state.pages)

    def length(self, sequence: SequenceId) -> int:
        """How many positions of an open sequence have KV. Raises KeyError."""
        return self._sequences[sequence].length

    # Compute

    def forward(self, batch: Sequence[StageWork]) -> list[StageResult]:
        """Run the batch; results are in its order.

        A `start` below a sequence's length forgets the KV from there on first (a step may be repeated). Raises, with
        nothing changed: KvExhausted (an OutOfKv) where the pool has no room; ValueError for a gap, work that does
        not fit its sequence, a sequence that is not open or is there twice.
        """
        if not batch:
            return []
        self._use_threads()
        jobs = [self._check(work) for work in batch]
        if len({work.sequence for work in batch}) < len(batch):
            raise ValueError("a sequence is there twice in one batch")
        with torch.inference_mode():
            self._reserve(jobs)
            # Single tokens first, in the order of their KV in memory: their attention then needs no gathering.
            order = sorted(range(len(jobs)), key=lambda index: self._row_key(jobs[index]))
            items: dict[int, Item] = {}
            row = 0
            for index in order:
                job = jobs[index]
                spec = job.sequence.spec
                items[index] = Item(
                    spec.layers, job.work.start, job.count, row, spec.prompt_tokens, job.sequence.pages
                )  # fmt: skip
                row += job.count
            hidden = torch.cat([self._input(jobs[index].work) for index in order])
            for segment in plan_segments(self.config, self._pool, self._ropes, [items[index] for index in order]):
                active = hidden if segment.rows is None else hidden[segment.rows]
                for layer in segment.layers.layers():
                    active = self._layers[layer](active, segment)
                if segment.rows is None:
                    hidden = active
                else:
                    hidden[segment.rows] = active
            results = self._finish(jobs, [items[index].row for index in range(len(jobs))], hidden)
        for job in jobs:
            job.sequence.length = job.work.start + job.count
        return results

    def logits(self, hidden: Tensor) -> Tensor:
        """Final norm and head: `[n, hidden_size]` to float32 `[n, vocab]`. Raises ValueError without a head."""
        if self._head is None:
            raise ValueError("no head is loaded")
        logits = self._head.head(self._head.final_norm(hidden)).float()
        cap = self.config.final_softcap
        return logits if cap is None else torch.tanh(logits / cap).mul_(cap)

    def _check(self, work: StageWork) -> _Job:
        sequence = self._sequences.get(work.sequence)
        where = f"sequence {work.sequence}"
        if sequence is None:
            raise ValueError(f"{where} is not open")
        layers = sequence.spec.layers
        last = layers.end == self.config.num_layers
        if layers.start == 0:
            if work.token_ids is None or work.hidden is not None:
                raise ValueError(f"{where} enters at layer 0 and takes token ids only")
            if not all(map(self._is_token, work.token_ids)):
                raise ValueError(f"{where}: a token id is outside the vocabulary")
            count = len(work.token_ids)
        else:
            if work.hidden is None or work.token_ids is not None:
                raise ValueError(f"{where} enters at layer {layers.start} and takes hidden states only")
            if work.hidden.dim() != 2 or work.hidden.shape[1] != self.config.hidden_size:
                raise ValueError(f"{where}: hidden is {list(work.hidden.shape)}, not [n, {self.config.hidden_size}]")
            count = work.hidden.shape[0]
        if count == 0:
            raise ValueError(f"{where}: work without tokens")
        if not 0 <= work.start <= sequence.length:
            raise ValueError(f"{where}: work starts at {work.start}, its KV ends at {sequence.length}")
        if work.start + count > self.options.max_context_tokens:
            raise ValueError(f"{where}: {work.start + count} tokens, at most {self.options.max_context_tokens}")
        if (work.sample or work.score is not None) and not last:
            raise ValueError(f"{where} ends at layer {layers.end}; only the last stage samples and scores")
        if work.sample and sequence.sampler is None:
            raise ValueError(f"{where} was opened without sampling parameters")
        if work.sample and sequence.sampler is not None:
            sequence.sampler.check(work.start + count)
        if work.score is not None:
            if len(work.score) != count:
                raise ValueError(f"{where}: {len(work.score)} ids to score for {count} tokens")
            if not all(token is None or self._is_token(token) for token in work.score):
                raise ValueError(f"{where}: an id to score is outside the vocabulary")
        return _Job(work, sequence, count)

    def _is_token(self, token: int) -> bool:
        return 0 <= token < self.config.vocab_size

    def _reserve(self, jobs: Sequence[_Job]) -> None:
        """Give every job its pages, or raise KvExhausted with nothing changed."""
        size = self._pool.page_tokens
        wanted = [-(-(job.work.start + job.count) // size) - len(job.sequence.pages) for job in jobs]
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

    @staticmethod
    def _row_key(job: _Job) -> tuple[bool, int, int]:
        first = job.sequence.pages[0]
        return (job.count > 1, id(first.slab), first.number)

    def _input(self, work: StageWork) -> Tensor:
        """`[n, hidden_size]` of one work item on the device."""
        if work.hidden is not None:
            return work.hidden.to(self._device, self._dtype)
        assert self._embedding is not None
        rows = self._embedding[torch.tensor(work.token_ids, device=self._device)]
        return rows if self._embedding_scale == 1.0 else rows * self._embedding_scale

    def _finish(self, jobs: Sequence[_Job], rows: Sequence[int], hidden: Tensor) -> list[StageResult]:
        """Results of jobs whose first rows are `rows` of the step's final hidden states."""
        tokens, logprobs = self._sample(jobs, rows, hidden)
        results = []
        for index, (job, row) in enumerate(zip(jobs, rows, strict=True)):
            own = hidden[row : row + job.count]
            if job.sequence.spec.layers.end < self.config.num_layers:
                results.append(StageResult(job.work.sequence, hidden=own))
                continue
            scores = self._score(job, own)
            results.append(
                StageResult(job.work.sequence, token=tokens.get(index), logprobs=logprobs.get(index), scores=scores)
            )
        return results

    def _sample(
        self, jobs: Sequence[_Job], rows: Sequence[int], hidden: Tensor
    ) -> tuple[dict[int, int], dict[int, TokenLogprobs]]:
        """Tokens and log probabilities by job index, where asked for."""
        drawing = [(index, job.sequence.sampler) for index, job in enumerate(jobs) if job.work.sample]
        picked = [(index, sampler) for index, sampler in drawing if sampler is not None]
        if not picked:
            return {}, {}
        last = torch.tensor([rows[index] + jobs[index].count - 1 for index, _ in picked], device=self._device)
        logits = self.logits(hidden[last])
        positions = [jobs[index].work.start + jobs[index].count for index, _ in picked]
        drawn = sample(logits, [sampler for _, sampler in picked], positions)
        tokens = {index: token for (index, _), token in zip(picked, drawn, strict=True)}
        reported = [
            (at, index, sampler.params.logprobs)
            for at, (index, sampler) in enumerate(picked)
            if sampler.params.logprobs is not None
        ]
        if not reported:
            return tokens, {}
        chosen = logits[torch.tensor([at for at, _, _ in reported], device=self._device)]
        found = token_logprobs(chosen, [drawn[at] for at, _, _ in reported], [top for _, _, top in reported])
        return tokens, {index: logprob for (_, index, _), logprob in zip(reported, found, strict=True)}

    def _score(self, job: _Job, hidden: Tensor) -> tuple[TokenLogprobs | None, ...] | None:
        """Log probabilities of the ids that follow the rows of `hidden [n, hidden_size]`, where asked for."""
        if job.work.score is None:
            return None
        sampler = job.sequence.sampler
        top = 0 if sampler is None else sampler.params.logprobs or 0
        wanted = [(row, token) for row, token in enumerate(job.work.score) if token is not None]
        scores: list[TokenLogprobs | None] = [None] * job.count
        for at in range(0, len(wanted), SCORE_ROWS):
            part = wanted[at : at + SCORE_ROWS]
            logits = self.logits(hidden[torch.tensor([row for row, _ in part], device=self._device)])
            found = token_logprobs(logits, [token for _, token in part], [top] * len(part))
            for (row, _), logprob in zip(part, found, strict=True):
                scores[row] = logprob
        return tuple(scores)

    def _use_threads(self) -> None:
        """torch's thread count belongs to the calling thread, so it is set where the work is done."""
        here = threading.get_ident()
        if self.options.threads and self._device.type == "cpu" and self._threads_set_in != here:
            torch.set_num_threads(self.options.threads)
            self._threads_set_in = here
