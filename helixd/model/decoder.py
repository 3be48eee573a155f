"""The one decoder and its declared differences: everything the engine must know about an architecture, as data.

Decides nothing about files or devices. `helixd.model.config` derives a `DecoderConfig` from a Hugging Face
`config.json`; `helixd.engine` computes from it and never looks at an architecture's name.
"""

from dataclasses import dataclass
from typing import Literal

from helixd.errors import ModelError

DType = Literal["float32", "float16", "bfloat16"]

DTYPE_BYTES: dict[DType, int] = {"float32": 4, "float16": 2, "bfloat16": 2}


def parse_dtype(name: str) -> DType:
    """The dtype called `name`. Raises ModelError for one that is not known."""
    for known in DTYPE_BYTES:
        if known == name:
            return known
    raise ModelError(f"dtype {name!r} is not known; supported: {', '.join(DTYPE_BYTES)}")


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary embedding of some layers.

    `rotary_dim` of the head's dimensions are rotated (first part, "rotate half" layout). `kind` selects the scaling:
    `default`, `linear`, `llama3` and `yarn` have fixed frequencies; `dynamic` (NTK) depends on a sequence's length.
    Fields that a kind does not use are None. `attention_factor` multiplies cos and sin (yarn).
    """

    theta: float
    rotary_dim: int
    kind: Literal["default", "linear", "dynamic", "llama3", "yarn"] = "default"
    factor: float = 1.0
    original_max_positions: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    attention_factor: float = 1.0
    truncate: bool = True


@dataclass(frozen=True, slots=True)
class MoeSpec:
    """Sparse feed-forward of a layer: `top_k` of `num_experts`, each of `intermediate_size`."""

    num_experts: int
    top_k: int
    intermediate_size: int
    normalize_top_k: bool


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """What differs from layer to layer.

    `window`: a token sees itself and the `window - 1` tokens before it; None sees all. `rope`: index into
    `DecoderConfig.ropes`, None for no rotation. `moe`: None for a dense feed-forward of `intermediate_size`.
    """

    window: int | None
    rope: int | None
    moe: MoeSpec | None = None


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """A decoder-only transformer, fully declared. Shapes follow the checkpoint (`[out, in]` linears).

    `norm_style`: `pre` norms the input of attention and of the feed-forward (Llama); `post` norms their outputs only
    (OLMo 2); `sandwich` does both (Gemma 2 and 3). `norm_plus_one`: the norm multiplies by `1 + w` (Gemma).
    `qk_norm`: `head` norms each head's q and k over head_dim before rotation (Qwen3, Gemma 3), `full` norms the
    whole projection (OLMo 2). `attention_scale` multiplies q.k. Soft caps are None where absent.
    `embedding_scale` multiplies the embedding's output. `tied`: the head is the embedding matrix.
    """

    architecture: str
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    layers: tuple[LayerSpec, ...]
    ropes: tuple[RopeSpec, ...]
    norm_eps: float
    dtype: DType
    tied: bool
    attention_scale: float
    activation: Literal["silu", "gelu_tanh"] = "silu"
    norm_style: Literal["pre", "post", "sandwich"] = "pre"
    norm_plus_one: bool = False
    qk_norm: Literal["head", "full"] | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    attention_softcap: float | None = None
    final_softcap: float | None = None
    embedding_scale: float = 1.0

    @property
    def num_layers(self) -> int:
        """How many decoder layers there are."""
        return len(self.layers)

    @property
    def kv_bytes_per_token_layer(self) -> int:
        """Bytes of K and V that one token takes in one layer, at the checkpoint's dtype."""
        return 2 * self.num_kv_heads * self.head_dim * DTYPE_BYTES[self.dtype]
