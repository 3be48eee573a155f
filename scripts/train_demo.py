#!/usr/bin/env python3
"""Train the demo model that helixd ships, tokenizer included, on the standard library's own source.

Runs for `--minutes` of wall time on a CPU and writes a checkpoint directory. The learning rate follows the clock:
flat, then linearly to zero at the end of the budget, the last part on longer windows. With `--resume DIR` the state is
kept in DIR every few minutes, and a run that was stopped goes on from there; the time it already used counts.
"""

import argparse
import json
import math
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from demo_corpus import (
    Document,
    Tokens,
    TokenStream,
    default_corpus_dir,
    encode,
    read_documents,
    split_documents,
    train_tokenizer,
)
from demo_export import TrainingFacts, export, rounded
from demo_network import Network, Shape
from demo_optimizer import Optimizer
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

_SEED = 2024
_TOKENS_PER_STEP = 4096
_WARMUP_STEPS = 50
_DECAY_FROM = 0.4
_EVAL_WINDOW = 1024
_EVAL_EVERY_S = 300.0
_LOG_EVERY_S = 20.0
_PROMPTS = ("def ", "import os\n", "class Foo:\n    def __init__(self")


@dataclass(frozen=True, slots=True)
class Phase:
    """Windows of `window` tokens until `until`, a fraction of the time budget."""

    window: int
    until: float


# Attention over short windows is cheap; a short second phase teaches the positions beyond them.
_PHASES = (Phase(window=256, until=0.75), Phase(window=1024, until=1.0))


@dataclass(frozen=True, slots=True)
class Progress:
    """How far training is: steps taken, tokens seen, seconds of the budget used."""

    step: int = 0
    tokens: int = 0
    used_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Loss:
    """Cross-entropy on held-out text."""

    nats_per_token: float
    bits_per_byte: float

    def __str__(self) -> str:
        return f"{self.nats_per_token:.4f} nats/token, {self.bits_per_byte:.4f} bits/byte"


def rate_scale(step: int, used: float) -> float:
    """Factor on the learning rates at `step`, `used` of the time budget gone."""
    return min(1.0, (step + 1) / _WARMUP_STEPS) * max(0.0, min(1.0, (1 - used) / (1 - _DECAY_FROM)))


def batches(ids: Tokens, window: int, seed: tuple[int, ...]) -> Iterator[Tensor]:
    """Endless `[batch, window + 1]` token ids: pass after pass over the stream, cut at new places, shuffled."""
    batch = max(1, _TOKENS_PER_STEP // window)
    rng = np.random.default_rng(seed)
    while True:
        starts = rng.permutation(np.arange(rng.integers(window), len(ids) - window, window))
        for chosen in starts[: len(starts) // batch * batch].reshape(-1, batch):
            rows = np.stack([ids[start : start + window + 1] for start in chosen])
            yield torch.from_numpy(rows.astype(np.int64))


@torch.no_grad()
def evaluate(network: Network, held_out: TokenStream) -> Loss:
    """Loss over all held-out tokens, in windows of `_EVAL_WINDOW` that do not overlap."""
    total, count = 0.0, 0
    for start in range(0, len(held_out.ids) - 1, _EVAL_WINDOW):
        ids = torch.from_numpy(held_out.ids[start : start + _EVAL_WINDOW + 1].astype(np.int64))[None]
        total += float(network.loss(ids)) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    return Loss(total / count, total / held_out.text_bytes / math.log(2))


@torch.no_grad()
def complete(network: Network, tokenizer: Tokenizer, prompt: str, max_tokens: int = 60) -> str:
    """`prompt` and its greedy continuation."""
    ids = tokenizer.encode(prompt).ids
    for _ in range(max_tokens):
        token = int(network(torch.tensor([ids]))[0, -1].argmax())
        if token == ids[0]:
            break
        ids.append(token)
    return tokenizer.decode(ids)


def save_state(directory: Path, network: Network, optimizer: Optimizer, progress: Progress) -> None:
    """Keep everything that `load_state` needs; the earlier state stays until the new one is whole."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {f"network.{name}": value for name, value in network.state_dict().items()} | optimizer.state()
    partial = directory / "state.safetensors.partial"
    save_file(tensors, partial, metadata={"progress": json.dumps(asdict(progress))})
    os.replace(partial, directory / "state.safetensors")


def load_state(directory: Path, network: Network, optimizer: Optimizer) -> Progress:
    """Take over the state kept in `directory`, if there is one."""
    path = directory / "state.safetensors"
    if not path.exists():
        return Progress()
    tensors = load_file(path)
    network.load_state_dict(
        {name.removeprefix("network."): value for name, value in tensors.items() if name.startswith("network.")}
    )
    optimizer.load_state(tensors)
    header_bytes = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8 : 8 + header_bytes])
    return Progress(**json.loads(header["__metadata__"]["progress"]))


def train(
    network: Network,
    optimizer: Optimizer,
    train_ids: Tokens,
    progress: Progress,
    budget_s: float,
    compiled: bool,
    checkpoint: Callable[[Progress], None],
) -> Progress:
    """Train until `budget_s` is used up; `checkpoint` is called every `_EVAL_EVERY_S`. Prints loss and tokens/s."""
    began_s = time.monotonic() - progress.used_s
    logged = checkpointed = progress
    smooth_loss = math.nan
    for phase in _PHASES:
        if progress.used_s >= phase.until * budget_s:
            continue
        loss_of = torch.compile(network.loss, dynamic=False) if compiled else network.loss
        for ids in batches(train_ids, phase.window, (_SEED, phase.window, progress.step)):
            loss = loss_of(ids)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step(rate_scale(progress.step, progress.used_s / budget_s))
            value = float(loss.detach())
            smooth_loss = value if math.isnan(smooth_loss) else 0.98 * smooth_loss + 0.02 * value
            progress = Progress(progress.step + 1, progress.tokens + ids.numel(), time.monotonic() - began_s)
            if progress.used_s - logged.used_s >= _LOG_EVERY_S:
                speed = (progress.tokens - logged.tokens) / (progress.used_s - logged.used_s)
                print(
                    f"{progress.used_s / 60:6.1f} min  step {progress.step:5d}  window {phase.window}  "
                    f"train loss {smooth_loss:.3f}  {speed:.0f} tokens/s",
                    flush=True,
                )
                logged = progress
            if progress.used_s - checkpointed.used_s >= _EVAL_EVERY_S:
                checkpoint(progress)
                checkpointed = progress
            if progress.used_s >= phase.until * budget_s:
                break
    return progress


def machine_name(threads: int) -> str:
    """The processor and how many threads were used on it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{threads} threads of a shared {models[0] if models else platform.machine()} CPU, float32"


def training_facts(
    loss: Loss,
    progress: Progress,
    minutes: float,
    threads: int,
    data: tuple[list[Document], list[Document]],
    tokens: int,
) -> TrainingFacts:
    """What the README says about a run over `data` (training and held-out documents; `tokens` in the former)."""
    train_documents, held_out = data
    return TrainingFacts(
        nats_per_token=loss.nats_per_token,
        bits_per_byte=loss.bits_per_byte,
        seconds=progress.used_s,
        budget_minutes=minutes,
        steps=progress.step,
        tokens=progress.tokens,
        windows=tuple(phase.window for phase in _PHASES),
        train_files=len(train_documents),
        train_bytes=sum(len(document.text.encode()) for document in train_documents),
        train_tokens=tokens,
        held_out_bytes=sum(len(document.text.encode()) for document in held_out),
        held_out=tuple(document.name for document in held_out),
        python=platform.python_version(),
        machine=machine_name(threads),
    )


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=45.0, help="wall time to train for (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parents[1] / "helixd" / "demo", help="checkpoint dir"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--resume", type=Path, help="keep state here, and go on from what is here")
    parser.add_argument("--corpus", type=Path, default=default_corpus_dir(), help="source tree (default: %(default)s)")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=shutil.which("g++") is not None,
        help="fuse with torch.compile, about 1.5 times as fast; needs g++ (default: if there is one)",
    )
    return parser.parse_args()


def main() -> None:
    """Train, print what came out, write the checkpoint."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(_SEED)
    train_documents, held_out_documents = split_documents(read_documents(arguments.corpus))
    shape = Shape()
    tokenizer = train_tokenizer(train_documents, shape.vocab_size)
    train_stream, held_out = encode(train_documents, tokenizer), encode(held_out_documents, tokenizer)
    network = Network(replace(shape, vocab_size=tokenizer.get_vocab_size()))
    optimizer = Optimizer(network)
    progress = load_state(arguments.resume, network, optimizer) if arguments.resume else Progress()
    parameters = sum(parameter.numel() for parameter in network.parameters())
    print(
        f"{parameters:,} parameters; {len(train_stream.ids):,} tokens "
        f"of {len(train_documents)} files to train on, {len(held_out.ids):,} of {len(held_out_documents)} held out",
        flush=True,
    )

    def checkpoint(at: Progress) -> None:
        if arguments.resume:
            save_state(arguments.resume, network, optimizer, at)
        print(f"{at.used_s / 60:6.1f} min  validation loss {evaluate(network, held_out)}", flush=True)
        print(complete(network, tokenizer, _PROMPTS[0]), flush=True)

    progress = train(
        network, optimizer, train_stream.ids, progress, arguments.minutes * 60, arguments.compile, checkpoint
    )
    if arguments.resume:
        save_state(arguments.resume, network, optimizer, progress)
    stored = rounded(network)
    loss = evaluate(stored, held_out)
    print(f"done: {progress.tokens:,} tokens, {progress.used_s / 60:.1f} min; float32 {evaluate(network, held_out)}")
    print(f"stored as bfloat16: {loss}")
    for prompt in _PROMPTS:
        print("---\n" + complete(stored, tokenizer, prompt))
    data = (train_documents, held_out_documents)
    facts = training_facts(loss, progress, arguments.minutes, arguments.threads, data, len(train_stream.ids))
    export(arguments.out, network, tokenizer, facts)
    print(f"---\nwrote {arguments.out}")


if __name__ == "__main__":
    main()
