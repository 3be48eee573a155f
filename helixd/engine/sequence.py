"""An open sequence on a node, and the check that a work item fits it. No tensors are computed here."""

from dataclasses import dataclass, field

from helixd.engine.kv import Page
from helixd.engine.sampling import SamplerState
from helixd.engine.types import SequenceSpec, StageWork
from helixd.model.decoder import DecoderConfig


@dataclass(slots=True, eq=False)
class OpenSequence:
    """`length` positions of KV are valid; they lie in `pages`. `sampler` is None where the stage does not sample."""

    spec: SequenceSpec
    sampler: SamplerState | None
    length: int = 0
    pages: list[Page] = field(default_factory=list)


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """A work item that fits its sequence: `count` tokens from `work.start` on."""

    work: StageWork
    sequence: OpenSequence
    count: int

    @property
    def end(self) -> int:
        """The position after the last token."""
        return self.work.start + self.count

    @property
    def row_key(self) -> tuple[bool, int, int]:
        """Sorts a step's rows: single tokens first, by where their KV lies, then chunks. For jobs that have pages."""
        first = self.sequence.pages[0]
        return (self.count > 1, id(first.slab), first.number)


def open_sequence(config: DecoderConfig, spec: SequenceSpec) -> OpenSequence:
    """A new sequence without KV. Raises ValueError for tokens outside the vocabulary."""
    biased = () if spec.sampling is None else spec.sampling.logit_bias
    if not all(0 <= token < config.vocab_size for token, _ in biased):
        raise ValueError(f"sequence {spec.id}: logit_bias names a token outside the vocabulary")
    if not all(0 <= token < config.vocab_size for token in spec.prefix):
        raise ValueError(f"sequence {spec.id}: the prefix has a token outside the vocabulary")
    sampler = None if spec.sampling is None else SamplerState(spec.sampling, spec.prompt_tokens, spec.prefix)
    return OpenSequence(spec, sampler)


def check_work(config: DecoderConfig, max_context_tokens: int, sequence: OpenSequence, work: StageWork) -> Job:
    """The job that `work` asks of its sequence. Raises ValueError saying what does not fit."""
    where = f"sequence {work.sequence}"
    count = _count(config, sequence, work)
    if count == 0:
        raise ValueError(f"{where}: work without tokens")
    if not 0 <= work.start <= sequence.length:
        raise ValueError(f"{where}: work starts at {work.start}, its KV ends at {sequence.length}")
    if work.start + count > max_context_tokens:
        raise ValueError(f"{where}: {work.start + count} tokens, at most {max_context_tokens} are allowed")
    end = sequence.spec.layers.end
    if (work.sample or work.score is not None) and end != config.num_layers:
        raise ValueError(f"{where} ends at layer {end}; only the last stage samples and scores")
    if work.sample:
        if sequence.sampler is None:
            raise ValueError(f"{where} was opened without sampling parameters")
        sequence.sampler.check(work.start + count)
    if work.score is not None:
        if len(work.score) != count:
            raise ValueError(f"{where}: {len(work.score)} ids to score for {count} tokens")
        if not all(token is None or 0 <= token < config.vocab_size for token in work.score):
            raise ValueError(f"{where}: an id to score is outside the vocabulary")
    return Job(work, sequence, count)


def _count(config: DecoderConfig, sequence: OpenSequence, work: StageWork) -> int:
    entry = sequence.spec.layers.start
    if entry == 0:
        if work.token_ids is None or work.hidden is not None:
            raise ValueError(f"sequence {work.sequence} enters at layer 0 and takes token ids only")
        if not all(0 <= token < config.vocab_size for token in work.token_ids):
            raise ValueError(f"sequence {work.sequence}: a token id is outside the vocabulary")
        return len(work.token_ids)
    if work.hidden is None or work.token_ids is not None:
        raise ValueError(f"sequence {work.sequence} enters at layer {entry} and takes hidden states only")
    if work.hidden.dim() != 2 or work.hidden.shape[1] != config.hidden_size:
        shape = list(work.hidden.shape)
        raise ValueError(f"sequence {work.sequence}: hidden states of shape {shape}, not [n, {config.hidden_size}]")
    return work.hidden.shape[0]
