"""A linear layer with an optional fused residual add: plain torch anywhere, oneDNN-packed weights on a CPU.

Packing reorders a weight once for oneDNN's kernels; the original is not kept, so weights are never held twice.
"""

import functools
import time
from collections.abc import Sequence
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
    """oneDNN's linear on a weight packed for it (CPU only).

    `widen`: from `_WIDE_ROWS` rows on the weight is expanded to float32 for the call, for CPUs whose half-precision
    arithmetic is slower than that of float32. `repeat`: one or two rows are computed as four, for CPUs on which
    oneDNN's kernel for four reads a weight from memory faster than the one for a single row.
    """

    __slots__ = ("_bias", "_repeat", "_weight", "_widen")

    def __init__(
        self, weight: Tensor, bias: Tensor | None = None, *, widen: bool = False, repeat: bool = False
    ) -> None:
        self._weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
        self._bias = bias
        self._repeat = repeat
        self._widen = widen and weight.numel() <= _WIDE_VALUES

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """See `Linear`."""
        out: Tensor
        rows = x.shape[0]
        if rows <= 2 and self._repeat:
            times = _FEW_ROWS // rows
            out = self(x.repeat(times, 1), None if residual is None else residual.repeat(times, 1))
            return out[:rows]
        if self._widen and rows >= _WIDE_ROWS:
            bias = None if self._bias is None else self._bias.float()
            wide = linear(x.float(), self._weight.to_dense(torch.float32), bias)
            return wide.to(x.dtype) if residual is None else wide.add_(residual).to(x.dtype)
        if residual is None:
            out = torch.ops.mkldnn._linear_pointwise.default(x, self._weight, self._bias, "none", _NO_SCALARS, "")
        else:
            out = torch.ops.mkldnn._linear_pointwise.binary(x, residual, self._weight, self._bias, "add")
        return out


_NO_SCALARS: list[float] = []
# Below this many values oneDNN's dispatch (25 us more than a plain call) costs more than its kernels save.
_PACK_VALUES = 1 << 18
# Expanding a weight takes as long as half precision loses on about this many rows (measured without AMX).
_WIDE_ROWS = 192
# An expanded weight is transient memory: at most 256 MiB of it.
_WIDE_VALUES = 1 << 26
# Expanding must win by this factor in the trial, so that a busy machine does not decide.
_WIDE_GAIN = 1.2
_FEW_ROWS = 4
_FEW_GAIN = 1.05
# A smaller weight stays in a cache, where one row is the fastest.
_FEW_VALUES = 1 << 20
# The weights that repeating rows is tried with: more than caches hold, so that memory is what is measured.
_FEW_SHAPE, _FEW_BYTES = (4096, 2048), 64 << 20


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
    if weight.numel() < _PACK_VALUES or not packable(weight.device, weight.dtype):
        return PlainLinear(weight, bias)
    return PackedLinear(
        weight, bias, widen=weight.dtype != torch.float32 and _widening_wins(weight.dtype),
        repeat=weight.numel() >= _FEW_VALUES and _repeating_wins(weight.dtype),
    )  # fmt: skip


@functools.cache
def _widening_wins(dtype: torch.dtype) -> bool:
    """One trial per process: is a packed half-precision linear of many rows slower than expanding to float32?

    It is on CPUs with AVX512-BF16 but no AMX whose bf16 dot products run at half the rate of float32 (1.5x measured).
    """
    weight = torch.randn((1024, 1024), generator=torch.Generator().manual_seed(0)).to(dtype)
    x = weight[: 2 * _WIDE_ROWS]
    native, wide = (_least_s([PackedLinear(weight, widen=widen)], x) for widen in (False, True))
    return native > _WIDE_GAIN * wide


@functools.cache
def _repeating_wins(dtype: torch.dtype) -> bool:
    """One trial per process: does a row through weights out of cache take longer alone than as four equal ones?

    It does on Zen 4 (1.3x in float32, 1.2x in bfloat16 measured).
    """
    weight = torch.randn(_FEW_SHAPE, generator=torch.Generator().manual_seed(0)).to(dtype)
    count = _FEW_BYTES // weight.nbytes
    alone, repeated = (
        _least_s([PackedLinear(weight, repeat=repeat) for _ in range(count)], weight[:1]) for repeat in (False, True)
    )
    return alone > _FEW_GAIN * repeated


def _least_s(runs: Sequence[Linear], x: Tensor) -> float:
    times = []
    for _ in range(5):
        began = time.thread_time()
        for run in runs:
            run(x)
        times.append(time.thread_time() - began)
    return min(times)
