"""What the planner is told of a device: layer times on random weights, and what its memory holds."""

import dataclasses

import psutil

from helixd.engine.memory import (
    RUNTIME_BYTES,
    device_memory,
    kv_bytes_per_token_layer,
    kv_room_token_layers,
    weight_bytes,
)
from helixd.engine.timing import measure_layer_times
from helixd.engine.types import EngineOptions
from helixd.layers import LayerRange
from helixd.model.config import parse_config
from helixd.model.decoder import MoeSpec

CONFIG = parse_config(
    {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 5,
        "vocab_size": 64,
        "max_position_embeddings": 128,
        "torch_dtype": "bfloat16",
    }
)
LAYER_VALUES = 32 * (32 + 16 + 16) + 32 * 32 + 3 * 32 * 48 + 2 * 32


def test_points_are_measured_for_every_size_within_the_budget() -> None:
    times = measure_layer_times(
        CONFIG, EngineOptions(max_context_tokens=64), prompt_tokens=(4, 16, 64, 900), decode_batches=(1, 3), layers=2
    )
    assert [tokens for tokens, _ in times.prompt_layer_time_s] == [4, 16, 64]
    assert [batch for batch, _ in times.decode_layer_time_s] == [1, 3]
    assert all(seconds > 0 for _, seconds in times.prompt_layer_time_s + times.decode_layer_time_s)


def test_a_spent_budget_leaves_two_points() -> None:
    times = measure_layer_times(CONFIG, EngineOptions(), prompt_tokens=(2, 4, 8, 16), budget_s=0.0)
    assert len(times.prompt_layer_time_s) == len(times.decode_layer_time_s) == 2


def test_sparse_layers_and_single_layers_are_measured() -> None:
    moe = MoeSpec(num_experts=4, top_k=2, intermediate_size=16, normalize_top_k=True)
    config = dataclasses.replace(
        CONFIG,
        architecture="MixtralForCausalLM",
        layers=tuple(dataclasses.replace(spec, moe=moe) for spec in CONFIG.layers[:1]),
    )
    times = measure_layer_times(config, EngineOptions(), prompt_tokens=(4,), decode_batches=(1,), layers=3)
    assert len(times.prompt_layer_time_s) == 1


def test_weights_are_counted_as_held() -> None:
    assert weight_bytes(CONFIG, "bfloat16", LayerRange(1, 3), embedding=False, head=False) == 2 * 2 * LAYER_VALUES
    assert weight_bytes(CONFIG, "float32", LayerRange(0, 5), embedding=True, head=True) == 4 * (
        5 * LAYER_VALUES + 2 * 64 * 32 + 32
    )


def test_what_is_left_of_the_budget_is_kv() -> None:
    per_token = kv_bytes_per_token_layer(CONFIG, "bfloat16")
    assert per_token == 2 * 2 * 8 * 2
    budget = RUNTIME_BYTES["cpu"] + 1000 + 10 * per_token
    assert kv_room_token_layers(CONFIG, "bfloat16", "cpu", budget, 1000) == 10
    assert kv_room_token_layers(CONFIG, "bfloat16", "cpu", budget - 1, 1000) == 9
    assert kv_room_token_layers(CONFIG, "bfloat16", "cpu", 1000, 1000) == 0


def test_the_machines_memory_is_reported() -> None:
    memory = device_memory("cpu")
    assert memory.total_bytes == psutil.virtual_memory().total
    assert 0 < memory.free_bytes <= memory.total_bytes
