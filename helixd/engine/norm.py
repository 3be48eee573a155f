"""Root-mean-square norm, computed in float32 whatever the dtype."""

import torch
from torch import Tensor


class RmsNorm:
    """`x / rms(x) * w` over the last dimension, or `* (1 + w)` in float32 before the cast (Gemma)."""

    __slots__ = ("_eps", "_shape", "_weight", "_wide")

    def __init__(self, weight: Tensor, eps: float, plus_one: bool) -> None:
        self._shape = list(weight.shape[-1:])
        self._eps = eps
        self._wide = plus_one and weight.dtype != torch.float32
        self._weight = weight.float() + 1.0 if plus_one else weight

    def __call__(self, x: Tensor) -> Tensor:
        """`x [..., dim]` to the same shape and dtype."""
        if self._wide:
            return torch.rms_norm(x.float(), self._shape, self._weight, self._eps).to(x.dtype)
        return torch.rms_norm(x, self._shape, self._weight, self._eps)
