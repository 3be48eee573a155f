"""Root-mean-square norm, computed in float32 whatever the dtype."""

import torch
from torch import Tensor


class RmsNorm:
    """`x / rms(x) * w` over the last dimension, or `* (1 + w)` in float32 before the cast (Gemma)."""

    __slots__ = ("_eps", "_epsilon", "_shape", "_weight", "_wide")

    def __init__(self, weight: Tensor, eps: float, plus_one: bool) -> None:
        self._shape = list(weight.shape[-1:])
        self._eps = eps
        self._epsilon = torch.tensor(eps)
        self._wide = plus_one and weight.dtype != torch.float32
        self._weight = weight.float() + 1.0 if plus_one else weight

    def __call__(self, x: Tensor) -> Tensor:
        """`x [..., dim]` to the same shape and dtype."""
        wide = x.float() if self._wide else x
        if wide.dtype != torch.float32 or wide.device.type != "cpu":
            return torch.rms_norm(wide, self._shape, self._weight, self._eps).to(x.dtype)
        # On a CPU torch's own makes a float32 temporary of x's size for every factor; this makes one.
        length = torch.linalg.vector_norm(wide, 2, -1, keepdim=True)
        inverse = torch.addcmul(self._epsilon, length, length, value=1 / self._shape[0]).rsqrt_()
        return (wide * inverse).mul_(self._weight).to(x.dtype)
