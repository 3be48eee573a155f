"""What a device's memory holds: weights of j layers, embedding, head, KV; and what a device offers.

A worker's budget is spent on `RUNTIME_BYTES`, then weights, and what is left is KV. Sizes come from the config alone.
"""

from typing import NamedTuple

import psutil
import torch

from helixd.layers import LayerRange
from helixd.model.decoder import DTYPE_BYTES, DecoderConfig, DType
from helixd.model.sizes import embedding_bytes, head_bytes, layer_bytes

MIB = 1 << 20
# What a worker takes beside weights and KV: the interpreter with torch and the daemon (220 MiB measured on a CPU), the
# activations of a step, a weight expanded for the moment, and what malloc keeps (430 MiB in all at the most, measured
# with 0.3 and 0.6 billion parameters). While loading, a weight is in memory twice for a moment, before any KV is.
RUNTIME_BYTES = {"cpu": 512 * MIB, "cuda": 1024 * MIB}


class DeviceMemory(NamedTuple):
    """Bytes a device has, and bytes nobody uses now."""

    total_bytes: int
    free_bytes: int


def device_memory(device: str) -> DeviceMemory:
    """Memory of a torch device: the GPU's, or the machine's for the CPU. Raises RuntimeError for a missing GPU."""
    if torch.device(device).type == "cuda":
        free, total = torch.cuda.mem_get_info(torch.device(device))
        return DeviceMemory(total, free)
    memory = psutil.virtual_memory()
    return DeviceMemory(memory.total, memory.available)


def runtime_bytes(device: str) -> int:
    """What is set aside on a device before weights and KV."""
    return RUNTIME_BYTES.get(torch.device(device).type, RUNTIME_BYTES["cuda"])


def kv_bytes_per_token_layer(config: DecoderConfig, dtype: DType) -> int:
    """Bytes of K and V of one token in one layer at `dtype`."""
    return 2 * config.num_kv_heads * config.head_dim * DTYPE_BYTES[dtype]


def weight_bytes(config: DecoderConfig, dtype: DType, layers: LayerRange, *, embedding: bool, head: bool) -> int:
    """Bytes of the weights of `layers`, and of the embedding and the head where held (a tied head counts in full)."""
    held = sum(layer_bytes(config, dtype)[layers.start : layers.end])
    return (
        held + (embedding_bytes(config, dtype) if embedding else 0) + (head_bytes(config, dtype) if head else 0)
    )  # fmt: skip


def kv_room_token_layers(
    config: DecoderConfig, dtype: DType, device: str, budget_bytes: int, weights_bytes: int
) -> int:
    """KV room in tokens x layers that `budget_bytes` leaves beside `weights_bytes`; 0 where nothing is left."""
    left = budget_bytes - runtime_bytes(device) - weights_bytes
    return max(0, left // kv_bytes_per_token_layer(config, dtype))
