"""Rotary position embedding: the frequencies of a `RopeSpec` and the cos and sin of a step's tokens.

Formulas are those of the families' published checkpoints (as transformers computes them), in float32. Everything but
`dynamic` has fixed frequencies. For `dynamic` (NTK) a token at position p of a sequence whose prompt has m tokens
uses the frequencies of length max(m, p + 1), so chunked prefill and recovery give the same numbers as one pass.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from helixd.model.decoder import RopeSpec


class Rotation(NamedTuple):
    """cos and sin of n tokens, each `[n, 1, rotary_dim]`; the first half of `sin` is negated."""

    cos: Tensor
    sin: Tensor


class Rope:
    """One rotary embedding on one device."""

    def __init__(self, spec: RopeSpec, device: torch.device, dtype: torch.dtype) -> None:
        self.spec = spec
        self._dtype = dtype
        self._inverse = inverse_frequencies(spec).to(device)

    def rotation(self, positions: Tensor, lengths: Tensor) -> Rotation:
        """For tokens at `positions [n]` of sequences counted as `lengths [n]` tokens long (used by `dynamic` only)."""
        inverse = self._inverse
        if self.spec.kind == "dynamic":
            inverse = _dynamic_frequencies(self.spec, lengths)
        angles = positions.to(torch.float32).unsqueeze(-1) * inverse
        cos, sin = angles.cos(), angles.sin()
        if self.spec.attention_factor != 1.0:
            cos, sin = cos * self.spec.attention_factor, sin * self.spec.attention_factor
        cos, sin = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
        return Rotation(cos.unsqueeze(1).to(self._dtype), sin.unsqueeze(1).to(self._dtype))


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate the first `rotary_dim` of each head of `x [n, heads, head_dim]`; the rest passes through."""
    cos, sin = rotation
    dim = cos.shape[-1]
    if dim == x.shape[-1]:
        half = dim // 2
        swapped = torch.cat((x[..., half:], x[..., :half]), -1)
        return (x * cos).addcmul_(swapped, sin)
    return torch.cat((rotate(x[..., :dim], rotation), x[..., dim:]), -1)


def inverse_frequencies(spec: RopeSpec) -> Tensor:
    """`[rotary_dim / 2]` float32; for `dynamic` those of a sequence within the original length."""
    base = 1.0 / _powers(spec.theta, spec.rotary_dim)
    if spec.kind == "linear":
        return base / spec.factor
    if spec.kind == "llama3":
        return _llama3(spec, base)
    if spec.kind == "yarn":
        return _yarn(spec, base)
    return base


def _powers(theta: float, dim: int) -> Tensor:
    result: Tensor = theta ** (torch.arange(0, dim, 2, dtype=torch.int64).to(torch.float32) / dim)
    return result


def _dynamic_frequencies(spec: RopeSpec, lengths: Tensor) -> Tensor:
    """`[n, rotary_dim / 2]`: the base grows with the length once it exceeds the original one."""
    dim = spec.rotary_dim
    original = _required(spec.original_max_positions, "original_max_positions")
    seen = lengths.clamp(min=int(original)).to(torch.float32)
    theta = spec.theta * ((spec.factor * seen / original) - (spec.factor - 1)) ** (dim / (dim - 2))
    exponents = torch.arange(0, dim, 2, dtype=torch.int64, device=lengths.device).to(torch.float32) / dim
    return 1.0 / theta.unsqueeze(-1) ** exponents


def _llama3(spec: RopeSpec, base: Tensor) -> Tensor:
    low = _required(spec.low_freq_factor, "low_freq_factor")
    high = _required(spec.high_freq_factor, "high_freq_factor")
    original = _required(spec.original_max_positions, "original_max_positions")
    wavelength = 2 * math.pi / base
    smooth = (original / wavelength - low) / (high - low)
    between = (1 - smooth) * base / spec.factor + smooth * base
    scaled = torch.where(wavelength > original / low, base / spec.factor, between)
    return torch.where(wavelength < original / high, base, scaled)


def _yarn(spec: RopeSpec, base: Tensor) -> Tensor:
    dim = spec.rotary_dim
    original = _required(spec.original_max_positions, "original_max_positions")

    def dimension(rotations: float) -> float:
        return (dim * math.log(original / (rotations * 2 * math.pi))) / (2 * math.log(spec.theta))

    low = dimension(_required(spec.beta_fast, "beta_fast"))
    high = dimension(_required(spec.beta_slow, "beta_slow"))
    if spec.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return base / spec.factor * ramp + base * (1 - ramp)


def _required(value: float | None, field: str) -> float:
    if value is None:
        raise ValueError(f"this rotary scaling needs {field}, which is not set")
    return value
