"""A checkpoint's config.json as what the planner needs of a model."""

import json
from pathlib import Path

import pytest

from helixd.commands.failure import CommandFailed
from helixd.commands.model_sizes import model_of, model_spec
from helixd.exits import Exit
from helixd.model.config import parse_config

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5, "hidden_act": "silu", "torch_dtype": "bfloat16", "rope_theta": 5e5,
}  # fmt: skip
MIXTRAL = LLAMA | {
    "architectures": ["MixtralForCausalLM"], "num_local_experts": 8, "num_experts_per_tok": 2, "vocab_size": 32000,
}  # fmt: skip


def test_a_dense_model() -> None:
    found = model_spec("llama", parse_config(LLAMA))
    weights = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096
    assert found.num_layers == 32
    assert found.layer_bytes == 2 * weights
    assert found.activation_bytes == 2 * 4096
    assert found.embedding_bytes == 2 * 128256 * 4096
    assert found.head_bytes == 2 * (128256 * 4096 + 4096)
    assert found.work is not None
    assert found.work.kv_bytes_per_token == 2 * 8 * 128 * 2
    assert found.work.flops_per_token == 2 * weights
    assert (found.work.expert_bytes, found.work.expert_share, found.work.dtype) == (0, 1, "bfloat16")


def test_a_mixture_of_experts_computes_with_those_drawn() -> None:
    found = model_spec("mixtral", parse_config(MIXTRAL))
    expert = 3 * 4096 * 14336
    rest = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 2 * 4096 + 8 * 4096
    assert found.layer_bytes == 2 * (8 * expert + rest)
    assert found.work is not None
    assert found.work.expert_bytes == 2 * 8 * expert
    assert found.work.expert_share == 1 / 4
    assert found.work.flops_per_token == pytest.approx(2 * (2 * expert + rest))


def test_a_directory_needs_only_its_config(tmp_path: Path) -> None:
    directory = tmp_path / "models--org--name" / "snapshots" / "abc"
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(LLAMA))
    assert model_of(str(directory)).name == "org/name"
    (directory / "config.json").write_text(json.dumps(LLAMA | {"hidden_act": "relu"}))
    with pytest.raises(CommandFailed, match="hidden_act = 'relu' is not supported") as caught:
        model_of(str(directory))
    assert caught.value.status == Exit.BAD_MODEL
    (directory / "config.json").unlink()
    with pytest.raises(CommandFailed, match="has no config"):
        model_of(str(directory))
