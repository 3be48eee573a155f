"""The supported architectures as a table of declared differences from Llama.

A row says which config keys a family reads, what they default to where a checkpoint leaves them out (the defaults of
transformers' config classes, which Hub files rely on), and how it names its tensors. It computes nothing:
`helixd.model.config` and `helixd.model.names` interpret the rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

ALL_ROPES = ("default", "linear", "dynamic", "llama3", "yarn")


@dataclass(frozen=True, slots=True)
class ExpertNames:
    """Tensor names of a sparse feed-forward below `model.layers.N.`; `{e}` is the expert's number."""

    router: str
    gate: str
    up: str
    down: str


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture.

    `windows` says which layers slide: `none`; `all` of them; `late`, those from `max_window_layers` on; `pattern`,
    all but each `window_pattern`-th. `late` and `pattern` yield to an explicit `layer_types`. `gated_window`: the
    window counts only with `use_sliding_window`. `bias`: `attention_bias` puts biases on q, k, v and o. `local_rope`:
    sliding layers have a rotation of their own. `query_scalar`: the attention scale comes from
    `query_pre_attn_scalar` instead of head_dim. `scaled_embedding`: the embedding is multiplied by sqrt(hidden).
    `normalize_top_k` fixes what is otherwise `norm_topk_prob`.
    """

    defaults: Mapping[str, object]
    norm_style: Literal["pre", "post", "sandwich"] = "pre"
    norm_plus_one: bool = False
    qk_norm: Literal["head", "full"] | None = None
    bias: Literal["none", "qkv", "attention_bias"] = "none"
    mlp_bias: bool = False
    windows: Literal["none", "all", "late", "pattern"] = "none"
    gated_window: bool = False
    window_pattern: int = 0
    activation_key: str = "hidden_act"
    query_scalar: bool = False
    softcaps: bool = False
    scaled_embedding: bool = False
    local_rope: bool = False
    partial_rotary: bool = False
    ropes: tuple[str, ...] = ALL_ROPES
    fused: bool = False
    experts: ExpertNames | None = None
    normalize_top_k: bool | None = None


_COMMON: dict[str, object] = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
_QWEN: dict[str, object] = {
    **_COMMON,
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_GEMMA: dict[str, object] = {
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}

FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": Family(
        defaults={**_COMMON, "max_position_embeddings": 2048}, bias="attention_bias", mlp_bias=True
    ),
    "MistralForCausalLM": Family(
        defaults={**_COMMON, "max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
        windows="all",
    ),
    "Qwen2ForCausalLM": Family(defaults=_QWEN, bias="qkv", windows="late", gated_window=True),
    "Qwen3ForCausalLM": Family(
        defaults={**_QWEN, "head_dim": 128}, qk_norm="head", bias="attention_bias", windows="late", gated_window=True
    ),
    "Phi3ForCausalLM": Family(
        defaults={**_COMMON, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096},
        windows="all",
        partial_rotary=True,
        ropes=("default",),
        fused=True,
    ),
    "Gemma2ForCausalLM": Family(
        defaults={
            **_GEMMA,
            "max_position_embeddings": 8192,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        norm_style="sandwich",
        norm_plus_one=True,
        bias="attention_bias",
        windows="pattern",
        window_pattern=2,
        activation_key="hidden_activation",
        query_scalar=True,
        softcaps=True,
        scaled_embedding=True,
    ),
    "Gemma3ForCausalLM": Family(
        defaults={
            **_GEMMA,
            "max_position_embeddings": 131072,
            "rope_theta": 1e6,
            "rope_local_base_freq": 10000.0,
        },
        norm_style="sandwich",
        norm_plus_one=True,
        qk_norm="head",
        bias="attention_bias",
        windows="pattern",
        window_pattern=6,
        activation_key="hidden_activation",
        query_scalar=True,
        softcaps=True,
        scaled_embedding=True,
        local_rope=True,
    ),
    "Olmo2ForCausalLM": Family(
        defaults={**_COMMON, "rms_norm_eps": 1e-5, "max_position_embeddings": 2048},
        norm_style="post",
        qk_norm="full",
        bias="attention_bias",
    ),
    "MixtralForCausalLM": Family(
        defaults={
            **_COMMON,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "max_position_embeddings": 131072,
            "num_key_value_heads": 8,
            "num_experts_per_tok": 2,
            "num_experts": 8,
        },
        windows="all",
        experts=ExpertNames(
            router="block_sparse_moe.gate",
            gate="block_sparse_moe.experts.{e}.w1",
            up="block_sparse_moe.experts.{e}.w3",
            down="block_sparse_moe.experts.{e}.w2",
        ),
        normalize_top_k=True,
    ),
    "Qwen3MoeForCausalLM": Family(
        defaults={
            **_QWEN,
            "num_key_value_heads": 4,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "norm_topk_prob": False,
            "decoder_sparse_step": 1,
        },
        qk_norm="head",
        bias="attention_bias",
        windows="all",
        gated_window=True,
        experts=ExpertNames(
            router="mlp.gate",
            gate="mlp.experts.{e}.gate_proj",
            up="mlp.experts.{e}.up_proj",
            down="mlp.experts.{e}.down_proj",
        ),
    ),
}
