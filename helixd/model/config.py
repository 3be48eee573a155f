"""From a Hugging Face `config.json` to the `DecoderConfig` that the engine computes from.

Decides what is supported: whatever is not implemented is refused by name, with the key, its value and what is
supported, so that no checkpoint is ever computed wrongly in silence. The oracle for every rule here is transformers'
modelling code of the same architecture. Opens no file but `config.json`; knows nothing about tensors.

Gemma multiplies the embedding by sqrt(hidden_size). `DecoderConfig.embedding_scale` is that value unrounded; whoever
applies it rounds it to the dtype it computes in first (bfloat16: 2048 -> 45.25, not 45.2548), as transformers does.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, cast

from helixd.errors import ModelError
from helixd.model.decoder import DTYPE_BYTES, DecoderConfig, DType, LayerSpec, MoeSpec
from helixd.model.families import FAMILIES, Family
from helixd.model.fields import Fields
from helixd.model.files import read_json_object
from helixd.model.rope import GLOBAL, LOCAL, context_limit, parse_ropes

_ACTIVATIONS: Mapping[str, Literal["silu", "gelu_tanh"]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
}
_MAX_LAYERS = 4096

# A feature that none of the families implements here, and the values under which it is absent.
_ABSENT: Mapping[str, tuple[object, ...]] = {
    "quantization_config": (None, {}),
    "compression_config": (None, {}),
    "use_bidirectional_attention": (None, False),
    "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
    "attention_sinks": (None, False, 0),
    "attention_chunk_size": (None,),
    "clip_qkv": (None,),
    "alibi": (None, False),
    "no_rope_layers": (None, []),
    "attn_temperature_tuning": (None, False),
    "embedding_multiplier": (None, 1),
    "residual_multiplier": (None, 1),
    "attention_multiplier": (None,),
    "logits_scaling": (None, 1),
    "logit_scale": (None, 1),
}


def load_config(model_dir: Path) -> DecoderConfig:
    """The decoder of a checkpoint directory. Raises ModelError, also for a directory without `config.json`."""
    data = read_json_object(model_dir, "config.json")
    if data is None:
        raise ModelError(f"{model_dir} has no config.json; give the directory of a Hugging Face checkpoint")
    return parse_config(data)


def parse_config(data: Mapping[str, object]) -> DecoderConfig:
    """The decoder a parsed `config.json` declares. A config without dtype is float32, as in transformers.

    Raises ModelError naming the key and its value for anything unsupported, missing or contradictory.
    """
    architecture, family = _family(data)
    fields = Fields({**data, **_renamed(data)}, family.defaults)
    _refuse_features(fields, family)

    hidden = fields.integer("hidden_size")
    heads = fields.integer("num_attention_heads")
    kv_heads = fields.optional_integer("num_key_value_heads") or heads
    if heads % kv_heads:
        raise fields.refuse("num_key_value_heads", f"divisors of num_attention_heads = {heads}")
    head_dim = fields.optional_integer("head_dim")
    if head_dim is None:
        if hidden % heads:
            raise fields.refuse("hidden_size", f"multiples of num_attention_heads = {heads}, or an explicit head_dim")
        head_dim = hidden // heads
    ropes = parse_ropes(fields, family, head_dim)
    attention_bias = family.bias == "attention_bias" and fields.flag("attention_bias")
    scale_from = fields.number("query_pre_attn_scalar") if family.query_scalar else float(head_dim)
    return DecoderConfig(
        architecture=architecture,
        hidden_size=hidden,
        intermediate_size=fields.integer("intermediate_size"),
        vocab_size=fields.integer("vocab_size"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_positions=context_limit(fields, family, ropes[0]),
        layers=_layers(fields, family),
        ropes=ropes,
        norm_eps=fields.number("rms_norm_eps"),
        dtype=_dtype(fields),
        tied=fields.flag("tie_word_embeddings"),
        attention_scale=scale_from**-0.5,
        activation=_activation(fields, family),
        norm_style=family.norm_style,
        norm_plus_one=family.norm_plus_one,
        qk_norm=family.qk_norm,
        qkv_bias=family.bias == "qkv" or attention_bias,
        o_bias=attention_bias,
        mlp_bias=family.mlp_bias and fields.flag("mlp_bias"),
        attention_softcap=fields.optional_number("attn_logit_softcapping"),
        final_softcap=fields.optional_number("final_logit_softcapping"),
        embedding_scale=math.sqrt(hidden) if family.scaled_embedding else 1.0,
    )


def _family(data: Mapping[str, object]) -> tuple[str, Family]:
    architectures = data.get("architectures")
    supported = ", ".join(FAMILIES)
    if not isinstance(architectures, list) or len(architectures) != 1:
        raise ModelError(
            f"config.json: architectures = {architectures!r} must name exactly one architecture; supported: {supported}"
        )
    family = FAMILIES.get(architectures[0]) if isinstance(architectures[0], str) else None
    if family is None:
        raise ModelError(f"config.json: architecture {architectures[0]!r} is not supported; supported: {supported}")
    return cast(str, architectures[0]), family


def _renamed(data: Mapping[str, object]) -> dict[str, object]:
    """Values under the keys that are read, from the other keys that writers of checkpoints have used for them."""
    other = {"num_experts": "num_local_experts", "dtype": "torch_dtype"}
    return {key: data[alias] for key, alias in other.items() if data.get(key) is None and alias in data}


def _refuse_features(fields: Fields, family: Family) -> None:
    for key, absent in _ABSENT.items():
        if fields.raw(key) not in absent:
            raise fields.refuse(key, "a checkpoint without it")
    unread = []
    if family.bias == "none":
        unread.append("attention_bias")
    if not family.mlp_bias:
        unread.append("mlp_bias")
    if not family.softcaps:
        unread += ["attn_logit_softcapping", "final_logit_softcapping"]
    elif family.local_rope:
        # Gemma 3 has the key, but transformers caps no scores with it: nobody knows what a checkpoint would mean.
        unread.append("attn_logit_softcapping")
    for key in unread:
        if fields.raw(key):
            raise fields.refuse(key, "none for this architecture")


def _dtype(fields: Fields) -> DType:
    name = (fields.text("dtype") or "float32").removeprefix("torch.")
    if name not in DTYPE_BYTES:
        raise fields.refuse("dtype", ", ".join(DTYPE_BYTES))
    return name


def _activation(fields: Fields, family: Family) -> Literal["silu", "gelu_tanh"]:
    name = fields.text(family.activation_key) or ""
    if name not in _ACTIVATIONS:
        raise fields.refuse(family.activation_key, ", ".join(_ACTIVATIONS))
    return _ACTIVATIONS[name]


def _layers(fields: Fields, family: Family) -> tuple[LayerSpec, ...]:
    count = fields.integer("num_hidden_layers", maximum=_MAX_LAYERS)
    slides = _sliding(fields, family, count)
    window = fields.optional_integer("sliding_window") if any(slides) else None
    if any(slides) and window is None:
        raise ModelError("config.json: layer_types has sliding layers, but sliding_window gives no window")
    moe = _moe(fields, family)
    sparse = [False] * count
    if moe is not None:
        step = fields.optional_integer("decoder_sparse_step") or 1
        dense = set(fields.integers("mlp_only_layers"))
        sparse = [layer not in dense and (layer + 1) % step == 0 for layer in range(count)]
    return tuple(
        LayerSpec(
            window=window if slides[layer] else None,
            rope=1 if family.local_rope and slides[layer] else 0,
            moe=moe if sparse[layer] else None,
        )
        for layer in range(count)
    )


def _sliding(fields: Fields, family: Family, count: int) -> list[bool]:
    """Which layers have the window; an explicit `layer_types` that the architecture would ignore is refused."""
    has_window = fields.raw("sliding_window") is not None
    if family.gated_window:
        has_window = has_window and fields.flag("use_sliding_window")
    by_rule = [False] * count
    if family.windows == "all":
        by_rule = [has_window] * count
    elif family.windows == "late":
        first = fields.integer("max_window_layers", minimum=0)
        by_rule = [has_window and layer >= first for layer in range(count)]
    elif family.windows == "pattern":
        pattern = fields.optional_integer("sliding_window_pattern") if family.local_rope else None
        pattern = pattern or family.window_pattern
        by_rule = [(layer + 1) % pattern != 0 for layer in range(count)]
    types = fields.raw("layer_types")
    if types is None:
        return by_rule
    if not isinstance(types, list) or len(types) != count:
        raise fields.refuse("layer_types", f"a list of num_hidden_layers = {count} layer types")
    if any(kind not in (GLOBAL, LOCAL) for kind in types):
        raise fields.refuse("layer_types", f"{GLOBAL}, {LOCAL}")
    declared = [kind == LOCAL for kind in types]
    if family.windows in ("none", "all") and declared != by_rule:
        raise fields.refuse("layer_types", "what sliding_window says; this architecture has one kind of layer")
    if any(declared) and not has_window:
        raise fields.refuse("layer_types", f"{GLOBAL} only, unless a sliding_window is given and in use")
    return declared


def _moe(fields: Fields, family: Family) -> MoeSpec | None:
    if family.experts is None:
        return None
    experts = fields.integer("num_experts", minimum=0, maximum=65536)
    if experts == 0:
        return None
    top_k = fields.integer("num_experts_per_tok")
    if top_k > experts:
        raise fields.refuse("num_experts_per_tok", f"up to the number of experts, {experts}")
    normalize = family.normalize_top_k
    size_key = "moe_intermediate_size" if "moe_intermediate_size" in family.defaults else "intermediate_size"
    return MoeSpec(
        num_experts=experts,
        top_k=top_k,
        intermediate_size=fields.integer(size_key),
        normalize_top_k=fields.flag("norm_topk_prob") if normalize is None else normalize,
    )
