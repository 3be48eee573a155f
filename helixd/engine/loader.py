"""From a checkpoint's raw tensors to weights on a device: one tensor at a time, so memory holds little else.

Which tensors make up a weight is `helixd.model.names`' business. A weight is converted to the engine's dtype part by
part into its final place; linears are then packed and the plain copy is dropped.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from helixd.engine.layer import DecoderLayer, FeedForward, GatedMlp
from helixd.engine.linear import Linear, PlainLinear, make_linear, packable
from helixd.engine.moe import SparseMlp
from helixd.engine.norm import RmsNorm
from helixd.engine.output import Head
from helixd.errors import ModelError
from helixd.model.decoder import DecoderConfig, DType
from helixd.model.names import TensorSpec, embedding_weights, head_weights, layer_weights
from helixd.model.weights import WeightSource

TORCH_DTYPES: dict[DType, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


class WeightLoader:
    """Reads one model's weights from `source` for one device and dtype."""

    def __init__(self, config: DecoderConfig, source: WeightSource, device: torch.device, dtype: torch.dtype) -> None:
        self._config = config
        self._source = source
        self._device = device
        self._dtype = dtype

    def embedding(self) -> Tensor:
        """`[vocab, hidden]`."""
        return self._tensor(embedding_weights(self._config)["embedding"])

    def head(self, embedding: Tensor | None) -> Head:
        """The final norm and the head; a tied head on a device without packing shares `embedding` where given."""
        weights = head_weights(self._config)
        norm = self._norm(weights, "final_norm")
        if norm is None:
            raise ModelError("the model has no final norm")
        return Head(norm, self._head_linear(weights, embedding), self._config.final_softcap)

    def _head_linear(self, weights: Mapping[str, Sequence[TensorSpec]], embedding: Tensor | None) -> Linear:
        if self._config.tied and embedding is not None and not packable(self._device, self._dtype):
            return PlainLinear(embedding)
        return make_linear(self._tensor(weights["head"]))

    def layer(self, index: int) -> DecoderLayer:
        """Decoder layer `index`. Raises ModelError naming a tensor that is missing or misshapen."""
        config = self._config
        weights = layer_weights(config, index)
        spec = config.layers[index].moe
        feed_forward: FeedForward
        if spec is None:
            feed_forward = self._mlp(weights, "", config.intermediate_size)
        else:
            experts = [self._mlp(weights, f"expert.{e}.", spec.intermediate_size) for e in range(spec.num_experts)]
            # Too narrow to gain from packing, and its result decides which experts run.
            feed_forward = SparseMlp(spec, PlainLinear(self._tensor(weights["router"])), experts)
        return DecoderLayer(
            index=index,
            config=config,
            qkv=self._linear(weights, "qkv"),
            o=self._linear(weights, "o"),
            feed_forward=feed_forward,
            attention_norm=self._norm(weights, "attention_norm"),
            attention_post_norm=self._norm(weights, "attention_post_norm"),
            mlp_norm=self._norm(weights, "mlp_norm"),
            mlp_post_norm=self._norm(weights, "mlp_post_norm"),
            q_norm=self._norm(weights, "q_norm"),
            k_norm=self._norm(weights, "k_norm"),
        )

    def _mlp(self, weights: Mapping[str, Sequence[TensorSpec]], prefix: str, width: int) -> GatedMlp:
        gate_up, down = (self._linear(weights, prefix + name) for name in ("gate_up", "down"))
        return GatedMlp(self._config, width, gate_up, down)

    def _linear(self, weights: Mapping[str, Sequence[TensorSpec]], name: str) -> Linear:
        bias = weights.get(f"{name}_bias")
        return make_linear(self._tensor(weights[name]), None if bias is None else self._tensor(bias))

    def _norm(self, weights: Mapping[str, Sequence[TensorSpec]], name: str) -> RmsNorm | None:
        parts = weights.get(name)
        if parts is None:
            return None
        return RmsNorm(self._tensor(parts), self._config.norm_eps, self._config.norm_plus_one)

    def _tensor(self, parts: Sequence[TensorSpec]) -> Tensor:
        """The parts, concatenated along dimension 0, on the device in the engine's dtype."""
        if len(parts) == 1:
            return self._read(parts[0]).to(self._device, self._dtype)
        rows = sum(part.shape[0] for part in parts)
        whole = torch.empty((rows, *parts[0].shape[1:]), dtype=self._dtype, device=self._device)
        at = 0
        for part in parts:
            whole[at : at + part.shape[0]] = self._read(part)
            at += part.shape[0]
        return whole

    def _read(self, spec: TensorSpec) -> Tensor:
        if spec.name not in self._source:
            raise ModelError(f"tensor {spec.name} {list(spec.shape)} is missing from the checkpoint")
        raw = self._source.read(spec.name)
        if tuple(raw.shape) != tuple(spec.shape):
            raise ModelError(f"tensor {spec.name} has shape {list(raw.shape)}, the config says {list(spec.shape)}")
        dtype = next((dtype for name, dtype in TORCH_DTYPES.items() if name == raw.dtype), None)
        if dtype is None:
            raise ModelError(f"tensor {spec.name} is {raw.dtype}; supported are {', '.join(TORCH_DTYPES)}")
        if len(raw.data) != math.prod(spec.shape) * dtype.itemsize:
            raise ModelError(f"tensor {spec.name} {list(spec.shape)} of {raw.dtype} came with {len(raw.data)} bytes")
        return torch.frombuffer(raw.data, dtype=dtype).view(spec.shape)
