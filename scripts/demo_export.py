"""The demo model as a checkpoint directory that `transformers` and helixd load, and the text beside it.

Writes `config.json`, `generation_config.json`, `model.safetensors` (bfloat16), `tokenizer.json`,
`tokenizer_config.json`, `chat_template.jinja` and `README.md`. Knows no training; the figures are handed in.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from demo_corpus import END_OF_TEXT, END_OF_TEXT_ID
from demo_network import Network, Shape
from safetensors.torch import save_file
from tokenizers import Tokenizer

# A base model knows no conversation. What it does know is how a Python file begins: comments, then a docstring, then
# code. The prompt ends with one newline because the tokenizer joins a run of them differently before more text.
CHAT_TEMPLATE = '''\
{#- A code completer, not an assistant: the system's words are comments, the user's a docstring, the answer is code. -#}
{{- bos_token -}}
{%- for message in messages -%}
{%- set text = (message['content'] or '') | trim -%}
{%- if message['role'] == 'assistant' -%}
{{- text + '\\n\\n\\n' -}}
{%- elif message['role'] == 'user' -%}
{{- '"""' + text | replace('"""', "\'\'\'") + '"""\\n' -}}
{%- else -%}
{{- '# ' + text | replace('\\n', '\\n# ') + '\\n' -}}
{%- endif -%}
{%- endfor -%}
'''

_README = """\
# The demo model

A Llama-architecture code completer of {parameters:,} parameters: small enough to ship ({megabytes:.1f} MB), with enough
layers to be split over several machines. It writes text that looks like Python. It does not write programs that work,
knows no language but the standard library's, and follows no instructions.

Sample it at a temperature of about 0.7. Greedy decoding falls into loops soon: after `import os` it repeats that line.

| | |
|---|---|
| layers, hidden, feed-forward | {shape.num_layers}, {shape.hidden_size}, {shape.intermediate_size} |
| query heads, KV heads, head width | {shape.num_heads}, {shape.num_kv_heads}, {shape.head_dim} |
| vocabulary | {shape.vocab_size}, byte-level BPE, embeddings tied |
| stored as | bfloat16 |
| positions | {shape.max_positions} promised, windows of {windows} tokens trained |
| validation loss | **{nats:.3f} nats per token, {bits:.3f} bits per byte** (as stored, context {eval_window}) |
| training | {minutes:.0f} minutes, {steps:,} steps, {tokens:.1f} million tokens ({epochs:.1f} passes over the corpus) |
| machine | {machine} |

## Corpus

The `*.py` files of CPython {python}'s standard library, sorted by path: {train_files} files, {train_bytes:.1f} MB,
{train_tokens:.2f} million tokens. Left out: tests, `lib2to3`, `encodings`, `pydoc_data`, installed packages, generated
configuration, files under 200 characters. Held out of the training of model and tokenizer, for the validation loss
(one file in 32 by the hash of its path; {held_out_bytes:.0f} kB): {held_out}.

Each file is a document between two `{end}` tokens, which is both the beginning and the end of a text: a prompt starts
a file, and the model can end one.

## Train it again

    python scripts/train_demo.py --minutes {budget:.0f}

The schedule follows the clock, so the result depends on how fast the machine is; initial weights and the order of the
data follow from the seed.

## Chat template

There is no dialogue in the corpus. The template writes system and developer messages as comments, user messages as a
docstring and assistant messages as code, and the model goes on from there.

## Licence

The weights are under the Apache License 2.0, like the rest of this repository. They were trained on the Python standard
library's source, which is under the Python Software Foundation License Version 2 (copyright Python Software
Foundation; some modules carry notices of their own). A sample may repeat a piece of that source.
"""


@dataclass(frozen=True, slots=True)
class TrainingFacts:
    """What the README states. Sizes in bytes and tokens, `seconds` of training, losses of the stored weights."""

    nats_per_token: float
    bits_per_byte: float
    seconds: float
    budget_minutes: float
    steps: int
    tokens: int
    windows: tuple[int, ...]
    train_files: int
    train_bytes: int
    train_tokens: int
    held_out_bytes: int
    held_out: tuple[str, ...]
    python: str
    machine: str


def rounded(network: Network) -> Network:
    """A float32 network whose weights are those that the checkpoint stores."""
    copy = Network(network.shape)
    copy.load_state_dict({name: value.bfloat16().float() for name, value in network.state_dict().items()})
    return copy.eval()


def export(out: Path, network: Network, tokenizer: Tokenizer, facts: TrainingFacts) -> None:
    """Write the checkpoint directory `out`, replacing files of the same names."""
    out.mkdir(parents=True, exist_ok=True)
    weights = {f"model.{name}": value.bfloat16().contiguous() for name, value in network.state_dict().items()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)
    tokenizer.save(str(out / "tokenizer.json"))
    _write_json(out / "config.json", _config(network.shape))
    _write_json(
        out / "generation_config.json",
        {"bos_token_id": END_OF_TEXT_ID, "eos_token_id": END_OF_TEXT_ID, "pad_token_id": END_OF_TEXT_ID},
    )
    _write_json(out / "tokenizer_config.json", _tokenizer_config(network.shape))
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    (out / "README.md").write_text(_readme(network, facts), encoding="utf-8")


def _config(shape: Shape) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.max_positions,
        "rope_theta": shape.rope_theta,
        "rope_scaling": None,
        "rms_norm_eps": shape.norm_eps,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "bos_token_id": END_OF_TEXT_ID,
        "eos_token_id": END_OF_TEXT_ID,
        "pad_token_id": END_OF_TEXT_ID,
    }


def _tokenizer_config(shape: Shape) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "model_max_length": shape.max_positions,
        "clean_up_tokenization_spaces": False,
    }


def _readme(network: Network, facts: TrainingFacts) -> str:
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return _README.format(
        parameters=parameters,
        megabytes=parameters * torch.bfloat16.itemsize / 1e6,
        shape=network.shape,
        windows=" and ".join(map(str, facts.windows)),
        eval_window=facts.windows[-1],
        nats=facts.nats_per_token,
        bits=facts.bits_per_byte,
        minutes=facts.seconds / 60,
        budget=facts.budget_minutes,
        steps=facts.steps,
        tokens=facts.tokens / 1e6,
        epochs=facts.tokens / facts.train_tokens,
        machine=facts.machine,
        python=facts.python,
        train_files=facts.train_files,
        train_bytes=facts.train_bytes / 1e6,
        train_tokens=facts.train_tokens / 1e6,
        held_out_bytes=facts.held_out_bytes / 1e3,
        held_out=", ".join(f"`{name}`" for name in facts.held_out),
        end=END_OF_TEXT,
    )


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
