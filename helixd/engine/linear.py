"""A linear layer with an optional fused residual add: plain torch anywhere, oneDNN-packed weights on a CPU.

Packing reorders a weight once for oneDNN's kernels; the original is not kept, so weights are never held twice.
"""

from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear


class Linear(Protocol):
    """`x [n, in] -> [n, out]`, plus `residual [n, out]` where given."""

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Apply the layer."""
        ...


class PlainLinear:
    """`torch.nn.functional.linear` on a weight `[out, in]`."""

    __slots__ = ("_bias", "_weight")

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._weight = weight
        self._bias = bias

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """See `Linear`."""
        out = linear(x, self._weight, self._bias)
        return out if residual is None else out.add_(residual)


class PackedLinear:
    """oneDNN's linear on a weight packed for it (CPU only)."""

    __slots__ = ("_bias", "_weight")

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
        self._bias = bias

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """See `Linear`."""
        out: Tensor
        if residual is None:
            out = torch.ops.mkldnn._linear_pointwise.default(x, self._weight, self._bias, "none", _NO_SCALARS, "")
        else:
            out = torch.ops.mkldnn._linear_pointwise.binary(x, residual, self._weight, self._bias, "add")
        return out


_NO_SCALARS: list[float] = []


def packable(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN can run packed linears of `dtype` on `device`."""
    if device.type != "cpu" or not torch._C._has_mkldnn:
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return dtype == torch.float32


def make_linear(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """The fastest linear for where the weight `[out, in]` lies. The caller drops its own reference to `weight`."""
    if packable(weight.device, weight.dtype):
        return PackedLinear(weight, bias)
    return PlainLinear(weight, bias)
