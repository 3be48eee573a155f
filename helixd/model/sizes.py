"""Sizes and completeness of a model's parts: from the config alone, and against a checkpoint's tensors.

The config says through `helixd.model.names` which tensors there must be; this module adds them up and compares. It
reads no weights.
"""

import math
from collections.abc import Iterable, Mapping

from helixd.errors import ModelError
from helixd.layers import LayerRange
from helixd.model.decoder import DTYPE_BYTES, DecoderConfig, DType
from helixd.model.names import TensorSpec, embedding_weights, head_weights, layer_weights
from helixd.model.safetensors_header import TensorRef

_SHOWN = 10


def layer_bytes(config: DecoderConfig, dtype: DType | None = None) -> tuple[int, ...]:
    """Bytes of each layer's weights at `dtype` (the checkpoint's where None)."""
    return tuple(_bytes(config, layer_weights(config, layer), dtype) for layer in range(config.num_layers))


def embedding_bytes(config: DecoderConfig, dtype: DType | None = None) -> int:
    """Bytes of what a node that holds layer 0 also holds."""
    return _bytes(config, embedding_weights(config), dtype)


def head_bytes(config: DecoderConfig, dtype: DType | None = None) -> int:
    """Bytes of what a node that holds the last layer also holds; a tied head counts in full."""
    return _bytes(config, head_weights(config), dtype)


def required_tensors(
    config: DecoderConfig, layers: LayerRange | None = None, *, with_embedding: bool = True, with_head: bool = True
) -> dict[str, TensorSpec]:
    """The tensors that a stage needs, by name: of `layers` (None: all of them), the embedding and the head."""
    wanted = range(config.num_layers) if layers is None else layers.layers()
    groups = [layer_weights(config, layer) for layer in wanted]
    if with_embedding:
        groups.append(embedding_weights(config))
    if with_head:
        groups.append(head_weights(config))
    return {spec.name: spec for group in groups for parts in group.values() for spec in parts}


def check_tensors(
    tensors: Mapping[str, TensorRef],
    config: DecoderConfig,
    layers: LayerRange | None = None,
    *,
    with_embedding: bool = True,
    with_head: bool = True,
) -> None:
    """Whether a checkpoint's tensors are what the config declares. Raises ModelError naming what is wrong."""
    wanted = required_tensors(config, layers, with_embedding=with_embedding, with_head=with_head)
    problems = [problem for spec in wanted.values() if (problem := _problem(spec, tensors.get(spec.name)))]
    if problems:
        more = f" and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise ModelError(
            f"the checkpoint does not fit its config.json ({config.architecture}): {'; '.join(problems[:_SHOWN])}{more}"
        )


def _problem(spec: TensorSpec, ref: TensorRef | None) -> str | None:
    if ref is None:
        return f"{spec.name} is missing"
    if ref.shape != spec.shape:
        return f"{spec.name} has shape {list(ref.shape)}, expected {list(spec.shape)}"
    if ref.dtype not in DTYPE_BYTES:
        return f"{spec.name} is {ref.dtype}, supported are {', '.join(DTYPE_BYTES)}"
    return None


def _bytes(config: DecoderConfig, weights: Mapping[str, Iterable[TensorSpec]], dtype: DType | None) -> int:
    items = sum(math.prod(spec.shape) for parts in weights.values() for spec in parts)
    return items * DTYPE_BYTES[dtype or config.dtype]
