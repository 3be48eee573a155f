"""A checkpoint of a cluster file's sizes without its numbers: what a rehearsal's coordinator serves.

A Llama configuration whose layers, KV and activations are as large as the file says, a tokenizer of bytes, and
safetensors whose data is a hole in the file: it takes no room on the disk, and nobody reads it, since emulated workers
load nothing.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from helixd.model.config import parse_config
from helixd.model.decoder import DTYPE_BYTES
from helixd.model.sizes import layer_bytes, required_tensors
from helixd.plan.cluster.spec import ClusterSpec, ModelSpec, NodeProfile

_BYTES = 256
_KV_HEADS = 8
_DEFAULT_KV_BYTES = 4096.0


@dataclass(frozen=True, slots=True)
class HollowModel:
    """Sizes of the checkpoint written, in bytes; KV per token and layer."""

    layer_bytes: int
    kv_bytes_per_token_layer: int

    def memory_bytes(self, profile: NodeProfile) -> int:
        """A budget with which a node has the KV room of its profile beside one layer."""
        return int(profile.kv_capacity_token_layers[0] * self.kv_bytes_per_token_layer) + self.layer_bytes


def write_hollow_checkpoint(directory: Path, spec: ClusterSpec) -> HollowModel:
    """Write it into a new directory. Raises OSError; ValueError if the file's sizes fit no Llama."""
    raw = _config(spec.model, _kv_bytes(spec))
    config = parse_config(raw)
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(raw))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": []}))
    _byte_tokenizer().save(str(directory / "tokenizer.json"))
    header: dict[str, Any] = {}
    at = 0
    for tensor in required_tensors(config).values():
        size = DTYPE_BYTES["bfloat16"]
        for length in tensor.shape:
            size *= length
        header[tensor.name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        os.truncate(file.fileno(), 8 + len(text) + at)
    kv_bytes = 2 * config.num_kv_heads * config.head_dim * DTYPE_BYTES["bfloat16"]
    return HollowModel(max(layer_bytes(config, "bfloat16")), kv_bytes)


def _kv_bytes(spec: ClusterSpec) -> float:
    """What a layer more costs in KV room, in bytes per token and layer."""
    for node in spec.nodes:
        room = node.profile.kv_capacity_token_layers
        if len(room) > 1 and room[0] > room[1]:
            return spec.model.layer_bytes / (room[0] - room[1])
    return _DEFAULT_KV_BYTES


def _config(model: ModelSpec, kv_bytes: float) -> dict[str, Any]:
    hidden = int(model.activation_bytes) // 2
    head_dim = max(2, round(kv_bytes / (4 * _KV_HEADS) / 2) * 2)
    width = _KV_HEADS * head_dim
    left = model.layer_bytes / 2 - 4 * hidden * width - 2 * hidden
    intermediate = int(left // (3 * hidden)) if hidden else 0
    if intermediate < 1:
        raise ValueError(
            f"a layer of {model.layer_bytes:.0f} B is too small for activations of {model.activation_bytes:.0f} B"
            f" and {kv_bytes:.0f} B of KV per token"
        )
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": _KV_HEADS,
        "num_key_value_heads": _KV_HEADS,
        "head_dim": head_dim,
        "num_hidden_layers": model.num_layers,
        "vocab_size": _BYTES,
        "max_position_embeddings": 8192,
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
    }


def _byte_tokenizer() -> Tokenizer:
    # Byte-level BPE writes printable bytes as themselves and the others, in order, as the letters from 256 on.
    letters = set(pre_tokenizers.ByteLevel.alphabet())
    others = iter(sorted(letter for letter in letters if ord(letter) >= _BYTES))
    vocabulary = {chr(byte) if chr(byte) in letters else next(others): byte for byte in range(_BYTES)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
