"""Tiny random checkpoints of every supported family, and what transformers says of them: the oracle of exactness.

`make_checkpoint` writes one; `exact_checkpoint` tries seeds until the two best logits differ by more than `MARGIN` at
every position of the given prompts, so that sums in another order cannot change a greedy token.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import transformers

# More threads than free cores wait for each other by spinning: tiny models then take seconds instead of milliseconds.
torch.set_num_threads(1)

MARGIN = 1e-3
VOCAB = 256
LAYERS = 6
_EOS = VOCAB - 1


def _common(**overrides: object) -> dict[str, object]:
    return {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": _EOS,
        "pad_token_id": 0,
        **overrides,
    }


def _llama(rope: dict[str, object] | None = None, **overrides: object) -> transformers.PretrainedConfig:
    parameters = {"rope_type": "default", "rope_theta": 10000.0, **(rope or {})}
    return transformers.LlamaConfig(**_common(rope_parameters=parameters, **overrides))


def _gemma3() -> transformers.PretrainedConfig:
    ropes = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
        "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    }
    return transformers.Gemma3TextConfig(
        **_common(
            head_dim=32,
            query_pre_attn_scalar=24,
            sliding_window=8,
            layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
            rope_parameters=ropes,
            tie_word_embeddings=True,
        )
    )


_CONFIGS: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "llama2": lambda: _llama(num_key_value_heads=4),
    "llama-tied": lambda: _llama(tie_word_embeddings=True),
    "llama-bias": lambda: _llama(attention_bias=True, mlp_bias=True),
    "llama-linear": lambda: _llama({"rope_type": "linear", "factor": 4.0}),
    "llama-dynamic": lambda: _llama({"rope_type": "dynamic", "factor": 2.0}, max_position_embeddings=40),
    "llama3": lambda: _llama(
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    ),
    "llama-yarn": lambda: _llama({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}),
    "mistral": lambda: transformers.MistralConfig(**_common(sliding_window=8, head_dim=16)),
    "qwen2": lambda: transformers.Qwen2Config(**_common()),
    "qwen3": lambda: transformers.Qwen3Config(**_common(head_dim=32, tie_word_embeddings=True)),
    "phi3": lambda: transformers.Phi3Config(**_common(sliding_window=16)),
    "phi3-partial": lambda: transformers.Phi3Config(**_common(partial_rotary_factor=0.5, sliding_window=None)),
    "gemma2": lambda: transformers.Gemma2Config(
        **_common(
            head_dim=32,
            query_pre_attn_scalar=24,
            sliding_window=8,
            attn_logit_softcapping=5.0,
            final_logit_softcapping=8.0,
            tie_word_embeddings=True,
        )
    ),
    "gemma3": _gemma3,
    "olmo2": lambda: transformers.Olmo2Config(**_common()),
    "mixtral": lambda: transformers.MixtralConfig(
        **_common(num_local_experts=4, num_experts_per_tok=2, sliding_window=None)
    ),
    "qwen3-moe": lambda: transformers.Qwen3MoeConfig(
        **_common(
            head_dim=32,
            num_experts=8,
            num_experts_per_tok=3,
            moe_intermediate_size=32,
            norm_topk_prob=True,
            mlp_only_layers=[1],
        )
    ),
}
FAMILIES: tuple[str, ...] = tuple(_CONFIGS)


def make_checkpoint(family: str, path: Path, seed: int) -> None:
    """Write config.json, model.safetensors and generation_config.json of a random fp32 model of `family`."""
    config = _CONFIGS[family]()
    config.dtype = torch.float32
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            # Norm weights and biases stay near what they were made as, but must matter.
            parameter.copy_(noise * 0.15 if parameter.dim() > 1 else parameter + noise * 0.2)
    model.tie_weights()
    model.save_pretrained(path)


class Reference(NamedTuple):
    """Greedy `tokens`, the raw `logits [n, vocab]` each was taken from, and the least lead of a best logit."""

    tokens: tuple[int, ...]
    logits: torch.Tensor
    margin: float


@functools.lru_cache(maxsize=4)
def _model(path: Path) -> transformers.PreTrainedModel:
    model = transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype=torch.float32)
    model.generation_config.eos_token_id = None
    return model.eval()


@functools.cache
def reference(path: Path, prompt: tuple[int, ...], n: int) -> Reference:
    """What `transformers` generates greedily after `prompt`, going on past the end token."""
    model = _model(path)
    with torch.inference_mode():
        out = model.generate(
            torch.tensor([prompt]),
            generation_config=transformers.GenerationConfig(
                max_new_tokens=n, do_sample=False, pad_token_id=0, return_dict_in_generate=True, output_logits=True
            ),
        )
    logits = torch.cat(out.logits).float()
    best = logits.topk(2, -1).values
    tokens = tuple(out.sequences[0, len(prompt) :].tolist())
    return Reference(tokens, logits, float((best[:, 0] - best[:, 1]).min()))


def reference_tokens(path: Path, prompt: Sequence[int], n: int) -> list[int]:
    """The oracle's greedy tokens. Raises ValueError where two logits lie too close to say which is best."""
    found = reference(path, tuple(prompt), n)
    if found.margin <= MARGIN:
        raise ValueError(f"{path}: the two best logits differ by {found.margin:.2g} somewhere; take another seed")
    return list(found.tokens)


def exact_checkpoint(family: str, path: Path, prompts: Sequence[Sequence[int]], n: int, seed: int = 0) -> None:
    """A checkpoint in a new directory `path` on which `reference_tokens` holds for all of `prompts`."""
    for attempt in range(200):
        at = path.with_name(f"{path.name}-seed{seed + attempt}")
        make_checkpoint(family, at, seed + attempt)
        if all(reference(at, tuple(prompt), n).margin > MARGIN for prompt in prompts):
            at.rename(path)
            return
    raise ValueError(f"no seed of {family} has clear greedy tokens for these prompts")
