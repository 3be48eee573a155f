"""One decoder layer: norms, projections, rotation, attention, feed-forward, as a `DecoderConfig` declares them."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from helixd.engine.linear import Linear
from helixd.engine.norm import RmsNorm
from helixd.engine.rope import rotate
from helixd.engine.step import Segment
from helixd.model.decoder import DecoderConfig


class FeedForward(Protocol):
    """`x [n, hidden]` to `[n, hidden]`, plus `residual` where given."""

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Apply it."""
        ...


class GatedMlp:
    """`down(activation(gate(x)) * up(x))` with gate and up in one projection."""

    __slots__ = ("_down", "_gate_up", "_gelu", "_width")

    def __init__(self, config: DecoderConfig, width: int, gate_up: Linear, down: Linear) -> None:
        self._width = width
        self._gelu = config.activation == "gelu_tanh"
        self._gate_up = gate_up
        self._down = down

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """See `FeedForward`."""
        gate, up = torch.split(self._gate_up(x), self._width, -1)
        active = torch.nn.functional.gelu(gate, approximate="tanh") if self._gelu else torch.nn.functional.silu(gate)
        return self._down(active.mul_(up), residual)


@dataclass(slots=True, eq=False)
class DecoderLayer:
    """The weights of one layer. Norms that the family lacks are None; `qk_scale` is `[heads + kv_heads, head_dim]`."""

    index: int
    config: DecoderConfig
    qkv: Linear
    o: Linear
    feed_forward: FeedForward
    attention_norm: RmsNorm | None = None
    attention_post_norm: RmsNorm | None = None
    mlp_norm: RmsNorm | None = None
    mlp_post_norm: RmsNorm | None = None
    q_norm: RmsNorm | None = None
    k_norm: RmsNorm | None = None

    def __call__(self, hidden: Tensor, segment: Segment, keep: Tensor | None = None) -> Tensor:
        """`hidden [n, hidden_size]` of the segment's rows through the layer, as a new tensor.

        `keep`: indices of the rows that are wanted of it, all if None; of the others only the KV is made.
        """
        q, k, v = self._projections(hidden if self.attention_norm is None else self.attention_norm(hidden), segment)
        segment.store(self.index, k, v)
        if keep is not None and len(keep) == 0:
            return hidden[:0]
        mixed = segment.attend(self.index, q, k, v)
        if keep is not None:
            mixed, hidden = mixed[keep], hidden[keep]
        if self.attention_post_norm is None:
            hidden = self.o(mixed, hidden)
        else:
            hidden = self.attention_post_norm(self.o(mixed)).add_(hidden)
        x = hidden if self.mlp_norm is None else self.mlp_norm(hidden)
        if self.mlp_post_norm is None:
            return self.feed_forward(x, hidden)
        return self.mlp_post_norm(self.feed_forward(x)).add_(hidden)

    def _projections(self, x: Tensor, segment: Segment) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated `q [n, heads, head_dim]` and `k`, and `v`, `[n, kv_heads, head_dim]`."""
        config = self.config
        queries, kv, dim = config.num_heads, config.num_kv_heads, config.head_dim
        rows = x.shape[0]
        qkv = self.qkv(x)
        heads = qkv.view(rows, queries + 2 * kv, dim)
        qk, v = heads[:, : queries + kv], heads[:, queries + kv :]
        if self.q_norm is not None and self.k_norm is not None:
            if config.qk_norm == "head":
                qk = torch.cat((self.q_norm(qk[:, :queries]), self.k_norm(qk[:, queries:])), 1)
            else:
                flat = qkv[:, : queries * dim], qkv[:, queries * dim : (queries + kv) * dim]
                qk = torch.cat((self.q_norm(flat[0]), self.k_norm(flat[1])), 1).view(rows, queries + kv, dim)
        rotation = segment.rotation(self.index)
        if rotation is not None:
            qk = rotate(qk, rotation)
        return qk[:, :queries], qk[:, queries:], v
