"""Sparse feed-forward: a router picks `top_k` experts for each token; only those run."""

from collections.abc import Sequence

import torch
from torch import Tensor

from helixd.engine.layer import FeedForward
from helixd.engine.linear import Linear
from helixd.model.decoder import MoeSpec


class SparseMlp:
    """Router probabilities are a float32 softmax over all experts, normalised over the chosen ones if declared.

    A token's experts are summed in rising order of their number, whoever else is in the batch.
    """

    __slots__ = ("_experts", "_router", "_spec")

    def __init__(self, spec: MoeSpec, router: Linear, experts: Sequence[FeedForward]) -> None:
        self._spec = spec
        self._router = router
        self._experts = experts

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """See `FeedForward`."""
        shares, chosen = torch.softmax(self._router(x), -1, dtype=torch.float32).topk(self._spec.top_k, -1)
        if self._spec.normalize_top_k:
            shares = shares / shares.sum(-1, keepdim=True)
        shares = shares.to(x.dtype)
        out = torch.zeros_like(x)
        for expert in torch.unique(chosen).tolist():
            rows, slot = torch.where(chosen == expert)
            out.index_add_(0, rows, self._experts[expert](x[rows]) * shares[rows, slot].unsqueeze(-1))
        return out if residual is None else out.add_(residual)
