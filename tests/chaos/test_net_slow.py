"""Lines that are narrow, far or bad cost time and nobody's life: C6 and C7. Two stages, each on a host of its own."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import transformers

from tests.budget import examples
from tests.daemons import add_tokenizer, byte_tokenizer, completion
from tests.families import MARGIN, VOCAB
from tests.faults.cluster import HUB, NetDaemons, net_daemons
from tests.faults.load import load
from tests.faults.namespaces import why_not

pytestmark = pytest.mark.chaos

HIDDEN = 384
LAYERS = 2
LONG_PROMPT = [(at * at + 3 * at) % 90 + 35 for at in range(4096)]
"""Its rows are 6 MiB: more than twice what the line carries until a peer counts as dead."""
AFTER_LONG = 4
STREAMS = 6
PROMPTS = [[number * 7 % 90 + 35 + at for at in range(4 + 5 * number)] for number in range(STREAMS)]
NEW = 24
STAGES = {"a": (0, 1), "b": (1, 2)}
BAD_LINE_S = examples(0, 600)
"""For how long streams go over a bad line; at least once all of them."""


def answers(model: transformers.PreTrainedModel, prompt: list[int], n: int) -> tuple[list[int], float]:
    """What `transformers` says, and the least lead of a best logit."""
    with torch.inference_mode():
        out = model.generate(
            torch.tensor([prompt]),
            generation_config=transformers.GenerationConfig(
                max_new_tokens=n, do_sample=False, pad_token_id=0, return_dict_in_generate=True, output_logits=True
            ),
        )
    best = torch.cat(out.logits).float().topk(2, -1).values
    return out.sequences[0, len(prompt) :].tolist(), float((best[:, 0] - best[:, 1]).min())


class Reference:
    """A checkpoint of wide rows, and its texts."""

    def __init__(self, path: Path) -> None:
        self.path = path
        for seed in range(50):
            model = wide_model(seed)
            said = [answers(model, prompt, NEW) for prompt in PROMPTS]
            if min(lead for _, lead in said) > MARGIN:
                tokens, lead = answers(model, LONG_PROMPT, AFTER_LONG)
                if lead > MARGIN:
                    break
        else:
            raise AssertionError("no seed has clear answers")
        model.save_pretrained(path)
        add_tokenizer(path)
        tokenizer = byte_tokenizer(VOCAB)
        self.texts = [str(tokenizer.decode(ids)) for ids, _ in said]
        self.long_text = str(tokenizer.decode(tokens))


def wide_model(seed: int) -> transformers.PreTrainedModel:
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=4608, tie_word_embeddings=False, bos_token_id=1,
        eos_token_id=VOCAB - 1, pad_token_id=0, dtype=torch.float32,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.06 if parameter.dim() > 1 else parameter + noise * 0.2)
    model.generation_config.eos_token_id = None
    return model.eval()


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    if reason := why_not():
        pytest.skip(reason)
    return Reference(tmp_path_factory.mktemp("slow") / "m")


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, reference: Reference) -> Iterator[NetDaemons]:
    with net_daemons(tmp_path_factory.mktemp("net"), list(STAGES)) as made:
        made.pinned_cluster(reference.path, STAGES, worker=("--memory", "128MiB"))
        made.wait_ready()
        yield made


@pytest.fixture
def made(running: NetDaemons) -> Iterator[NetDaemons]:
    """In the end nobody was lost, however slow it was, and nothing is left of any request."""
    events = lost(running)
    failovers = running.get("/cluster")["requests"]["failovers"]
    yield running
    running.net.heal()
    print(running.tails())
    running.wait_idle()
    assert lost(running) == events
    assert running.get("/cluster")["requests"]["failovers"] == failovers


def lost(made: NetDaemons) -> list[str]:
    """What any daemon says of a peer that is dead."""
    words = (" worker_lost ", " link_lost ", " session_over ", " peer_lost ", " sequence_broken ")
    return [line for daemon in made.all.values() for line in daemon.text.splitlines() if any(w in line for w in words)]


def test_c6_a_prefill_far_longer_than_the_silence_crosses_a_narrow_line(made: NetDaemons, reference: Reference) -> None:
    """A stream that decodes meanwhile is not held up until the transfer is over."""
    assert len(LONG_PROMPT) * HIDDEN * 4 >= 6_000_000
    made.net.between(["a"], ["b"], rate_bytes_per_s=1e6, delay_s=0.05)
    made.net.between([HUB], ["a", "b"], delay_s=0.01)
    started_s = time.monotonic()
    with ThreadPoolExecutor(1) as threads:
        long = completion(made, LONG_PROMPT, AFTER_LONG)
        reading = threads.submit(long.read)
        with load(made, PROMPTS[:2], NEW) as under:
            pass
        overtaken = not reading.done()
        reading.result()
    print(f"C6: {time.monotonic() - started_s:.1f} s; others' longest pause {under.longest_gap_s:.2f} s meanwhile")
    assert long.error is None
    assert long.text == reference.long_text
    under.assert_whole(reference.texts[:2])
    assert overtaken


def test_c7_a_line_that_loses_and_shakes_costs_no_error(made: NetDaemons, reference: Reference) -> None:
    made.net.everywhere(loss=0.02, delay_s=0.03, jitter_s=0.03)
    ends_s = time.monotonic() + BAD_LINE_S
    rounds, worst_s = 0, 0.0
    while rounds == 0 or time.monotonic() < ends_s:
        with load(made, PROMPTS, NEW) as under:
            pass
        under.assert_whole(reference.texts)
        rounds, worst_s = rounds + 1, max(worst_s, under.longest_gap_s)
    print(f"C7: {rounds * STREAMS} streams, longest pause {worst_s:.2f} s, mean {under.mean_gap_s * 1000:.0f} ms")
