"""Which checkpoint tensors make up each weight of a layer, of the embedding and of the head, with their shapes.

A *logical weight* is the concatenation along dimension 0 of its parts, so that fused and separate checkpoints look
alike to the engine. Logical names of a layer (a missing key means the family has no such weight):

    attention_norm, attention_post_norm, mlp_norm, mlp_post_norm      norms before and after each half, [hidden]
    qkv, qkv_bias, o, o_bias                                          q rows, then k rows, then v rows
    q_norm, k_norm                                                    [head_dim] (`head`) or width of q, of k (`full`)
    gate_up, gate_up_bias, down, down_bias                            gate rows, then up rows
    router, expert.E.gate_up, expert.E.down                           mixture of experts, E from 0

Outside the layers: embedding (needed where a sequence enters at layer 0), final_norm and head (needed where it
leaves; for tied embeddings `head` is the embedding's tensor).
"""

from dataclasses import dataclass

from helixd.model.decoder import DecoderConfig
from helixd.model.families import FAMILIES

_NORM_NAMES = {
    "pre": {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"},
    "post": {"attention_post_norm": "post_attention_layernorm", "mlp_post_norm": "post_feedforward_layernorm"},
    "sandwich": {
        "attention_norm": "input_layernorm",
        "attention_post_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "mlp_post_norm": "post_feedforward_layernorm",
    },
}
_EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A checkpoint tensor by name and the shape it must have."""

    name: str
    shape: tuple[int, ...]


def layer_weights(config: DecoderConfig, layer: int) -> dict[str, tuple[TensorSpec, ...]]:
    """The logical weights of one decoder layer, each as its parts in order. Raises IndexError for no such layer."""
    if not 0 <= layer < config.num_layers:
        raise IndexError(f"layer {layer} of a model with {config.num_layers} layers")
    prefix = f"model.layers.{layer}."
    weights: dict[str, tuple[TensorSpec, ...]] = {
        logical: (TensorSpec(f"{prefix}{name}.weight", (config.hidden_size,)),)
        for logical, name in _NORM_NAMES[config.norm_style].items()
    }
    weights.update(_attention(config, prefix + "self_attn."))
    if config.layers[layer].moe is None:
        weights.update(_feed_forward(config, prefix + "mlp."))
    else:
        weights.update(_experts(config, layer, prefix))
    return weights


def embedding_weights(config: DecoderConfig) -> dict[str, tuple[TensorSpec, ...]]:
    """`embedding`."""
    return {"embedding": (TensorSpec(_EMBEDDING, (config.vocab_size, config.hidden_size)),)}


def head_weights(config: DecoderConfig) -> dict[str, tuple[TensorSpec, ...]]:
    """`final_norm` and `head`."""
    head = _EMBEDDING if config.tied else "lm_head.weight"
    return {
        "final_norm": (TensorSpec("model.norm.weight", (config.hidden_size,)),),
        "head": (TensorSpec(head, (config.vocab_size, config.hidden_size)),),
    }


def _attention(config: DecoderConfig, prefix: str) -> dict[str, tuple[TensorSpec, ...]]:
    q_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    rows = {"q_proj": q_width, "k_proj": kv_width, "v_proj": kv_width}
    if FAMILIES[config.architecture].fused:
        rows = {"qkv_proj": q_width + 2 * kv_width}
    weights = _linear("qkv", prefix, rows, config.hidden_size, config.qkv_bias)
    weights.update(_linear("o", prefix, {"o_proj": config.hidden_size}, q_width, config.o_bias))
    if config.qk_norm is not None:
        per_head = config.qk_norm == "head"
        for name, width in (("q_norm", q_width), ("k_norm", kv_width)):
            weights[name] = (TensorSpec(f"{prefix}{name}.weight", (config.head_dim if per_head else width,)),)
    return weights


def _feed_forward(config: DecoderConfig, prefix: str) -> dict[str, tuple[TensorSpec, ...]]:
    size = config.intermediate_size
    rows = {"gate_proj": size, "up_proj": size}
    if FAMILIES[config.architecture].fused:
        rows = {"gate_up_proj": 2 * size}
    weights = _linear("gate_up", prefix, rows, config.hidden_size, config.mlp_bias)
    weights.update(_linear("down", prefix, {"down_proj": config.hidden_size}, size, config.mlp_bias))
    return weights


def _experts(config: DecoderConfig, layer: int, prefix: str) -> dict[str, tuple[TensorSpec, ...]]:
    moe, names = config.layers[layer].moe, FAMILIES[config.architecture].experts
    if moe is None or names is None:
        raise ValueError(f"layer {layer} of {config.architecture} has no experts")
    hidden, size = config.hidden_size, moe.intermediate_size
    weights = _linear("router", prefix, {names.router: moe.num_experts}, hidden, False)
    for expert in range(moe.num_experts):
        rows = {names.gate.format(e=expert): size, names.up.format(e=expert): size}
        weights.update(_linear(f"expert.{expert}.gate_up", prefix, rows, hidden, False))
        weights.update(_linear(f"expert.{expert}.down", prefix, {names.down.format(e=expert): hidden}, size, False))
    return weights


def _linear(
    logical: str, prefix: str, rows: dict[str, int], columns: int, bias: bool
) -> dict[str, tuple[TensorSpec, ...]]:
    """A linear `[sum of rows, columns]` of the named parts, with its bias where there is one."""
    weights = {logical: tuple(TensorSpec(f"{prefix}{name}.weight", (n, columns)) for name, n in rows.items())}
    if bias:
        weights[f"{logical}_bias"] = tuple(TensorSpec(f"{prefix}{name}.bias", (n,)) for name, n in rows.items())
    return weights
