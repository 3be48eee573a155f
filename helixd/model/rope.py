"""Rotary settings of a `config.json`, in the old and the new form, as `RopeSpec`.

Old checkpoints have `rope_theta` and `rope_scaling` at the top (with `type` or `rope_type` inside); transformers 5
writes `rope_parameters` with `rope_theta` inside, for Gemma 3 one such object for each layer type. Semantics follow
transformers' `modeling_rope_utils.py`. Computes no frequencies; refuses every kind and key it does not know.
"""

import math

from helixd.errors import ModelError
from helixd.model.decoder import RopeSpec
from helixd.model.families import Family
from helixd.model.fields import Fields

_KNOWN_KEYS = {
    "type",
    "rope_type",
    "rope_theta",
    "partial_rotary_factor",
    "factor",
    "original_max_position_embeddings",
    "low_freq_factor",
    "high_freq_factor",
    "beta_fast",
    "beta_slow",
    "attention_factor",
    "mscale",
    "mscale_all_dim",
    "truncate",
}
# Beyond these, frequencies and lengths are no numbers any more.
_MOST_FACTOR, _MOST_THETA = 1e6, 1e30
GLOBAL, LOCAL = "full_attention", "sliding_attention"


def parse_ropes(fields: Fields, family: Family, head_dim: int) -> tuple[RopeSpec, ...]:
    """The rotations of the model: one, or for a family with local ropes the global and then the local one."""
    old, new = fields.mapping("rope_scaling"), fields.mapping("rope_parameters")
    if not family.local_rope:
        name, given = ("rope_scaling", old) if old else ("rope_parameters", new)
        return (_parse(fields, family, head_dim, given, name, "rope_theta"),)
    strangers = sorted(set(new) - {GLOBAL, LOCAL})
    if strangers:
        raise ModelError(f"config.json: rope_parameters.{strangers[0]} is unknown; expected {GLOBAL} and {LOCAL}")
    nested = Fields(new, {}, "config.json: rope_parameters")
    return (
        _parse(fields, family, head_dim, {**nested.mapping(GLOBAL), **old}, f"rope_parameters.{GLOBAL}", "rope_theta"),
        _parse(fields, family, head_dim, nested.mapping(LOCAL), f"rope_parameters.{LOCAL}", "rope_local_base_freq"),
    )


def context_limit(fields: Fields, family: Family, rope: RopeSpec) -> int:
    """How many positions a sequence may have.

    `max_position_embeddings`, stretched by linear and dynamic scaling (those configs state the unscaled length) and
    raised to original x factor for yarn. Gemma 3 states its scaled length already.
    """
    stated = fields.integer("max_position_embeddings")
    if family.local_rope:
        return stated
    if rope.kind in ("linear", "dynamic"):
        return int(stated * rope.factor)
    if rope.kind == "yarn" and rope.original_max_positions is not None:
        return max(stated, int(rope.original_max_positions * rope.factor))
    return stated


def _parse(top: Fields, family: Family, head_dim: int, given: dict[str, object], name: str, theta_key: str) -> RopeSpec:
    rope = Fields(given, {}, f"config.json: {name}")
    strangers = sorted(set(given) - _KNOWN_KEYS)
    kind = rope.text("rope_type") or rope.text("type") or "default"
    kind_key = "rope_type" if given.get("rope_type") else "type"
    if kind not in family.ropes:
        raise rope.refuse(kind_key, ", ".join(family.ropes))
    if strangers:
        raise rope.refuse(strangers[0], ", ".join(sorted(_KNOWN_KEYS)))
    theta = rope.optional_number("rope_theta") or top.number(theta_key)
    if not 1 < theta <= _MOST_THETA:
        own = rope.raw("rope_theta") is not None
        raise (rope if own else top).refuse("rope_theta" if own else theta_key, f"above 1, up to {_MOST_THETA:g}")
    rotary_dim = _rotary_dim(top, rope, family, head_dim)
    stated = top.integer("max_position_embeddings")
    original = (
        top.optional_integer("original_max_position_embeddings")
        or rope.optional_integer("original_max_position_embeddings")
        or stated
    )
    if kind == "linear":
        return RopeSpec(theta, rotary_dim, "linear", factor=_factor(rope))
    if kind == "dynamic":
        if rotary_dim <= 2:
            raise ModelError(f"config.json: {name}: dynamic scaling needs more than 2 rotated dimensions")
        return RopeSpec(theta, rotary_dim, "dynamic", factor=_factor(rope), original_max_positions=stated)
    if kind == "llama3":
        low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        if high <= low:
            raise rope.refuse("high_freq_factor", f"values above low_freq_factor = {low}")
        return RopeSpec(
            theta,
            rotary_dim,
            "llama3",
            factor=_factor(rope),
            original_max_positions=original,
            low_freq_factor=low,
            high_freq_factor=high,
        )
    if kind == "yarn":
        factor = stated / original if rope.raw("factor") is None else _factor(rope)
        return RopeSpec(
            theta,
            rotary_dim,
            "yarn",
            factor=factor,
            original_max_positions=original,
            beta_fast=rope.optional_number("beta_fast") or 32.0,
            beta_slow=rope.optional_number("beta_slow") or 1.0,
            attention_factor=_yarn_attention_factor(rope, factor),
            truncate=given.get("truncate") is None or rope.flag("truncate"),
        )
    return RopeSpec(theta, rotary_dim)


def _factor(rope: Fields) -> float:
    factor = rope.number("factor")
    if factor > _MOST_FACTOR:
        raise rope.refuse("factor", f"up to {_MOST_FACTOR:g}")
    return factor


def _rotary_dim(top: Fields, rope: Fields, family: Family, head_dim: int) -> int:
    source = rope if rope.raw("partial_rotary_factor") is not None else top
    fraction = source.optional_number("partial_rotary_factor") or 1.0
    if fraction > 1 or (fraction != 1 and not family.partial_rotary):
        raise source.refuse("partial_rotary_factor", "up to 1.0" if family.partial_rotary else "1.0")
    rotary_dim = int(head_dim * fraction)
    if rotary_dim < 2 or rotary_dim % 2:
        raise ModelError(f"config.json: {rotary_dim} rotated dimensions of head_dim = {head_dim}; must be even, >= 2")
    return rotary_dim


def _yarn_attention_factor(rope: Fields, factor: float) -> float:
    """Explicit, or from the two mscales, or 0.1 ln(factor) + 1 (the YaRN paper, arXiv 2309.00071, eq. 22)."""
    explicit = rope.optional_number("attention_factor")
    if explicit is not None:
        return explicit

    def magnitude(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    mscale, mscale_all = rope.raw("mscale"), rope.raw("mscale_all_dim")
    if mscale and mscale_all:
        return magnitude(rope.number("mscale")) / magnitude(rope.number("mscale_all_dim"))
    return magnitude(1.0)
