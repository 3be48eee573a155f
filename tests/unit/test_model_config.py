import dataclasses
import json
import math

import pytest

from helixd.errors import ModelError
from helixd.model.config import load_config, parse_config
from helixd.model.decoder import MoeSpec, RopeSpec
from tests.unit.model_families import HUB, TINY, tiny_checkpoint


def windows(name, **changes):
    return [layer.window for layer in parse_config({**HUB[name], **changes}).layers]


@pytest.mark.parametrize("name", HUB)
def test_old_and_new_key_forms_give_the_same_decoder(name):
    """transformers reads the Hub's form and writes its new one; both must mean the same to us."""
    transformers = pytest.importorskip("transformers")
    old = parse_config(HUB[name])
    config = transformers.AutoConfig.for_model(**HUB[name])
    new = json.loads(config.to_json_string(use_diff=False))
    assert "rope_parameters" in new
    assert "torch_dtype" not in new
    assert parse_config(new) == old


@pytest.mark.parametrize("name", HUB)
def test_layers_and_scales_agree_with_transformers(name):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoConfig.for_model(**HUB[name])
    ours = parse_config(HUB[name])
    types = getattr(theirs, "layer_types", None)
    window = getattr(theirs, "sliding_window", None)
    if types is None:
        types = ["full_attention" if window is None else "sliding_attention"] * theirs.num_hidden_layers
    assert [layer.window for layer in ours.layers] == [window if t == "sliding_attention" else None for t in types]
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)
    assert ours.tied == theirs.tie_word_embeddings
    assert ours.attention_scale == getattr(theirs, "query_pre_attn_scalar", ours.head_dim) ** -0.5


@pytest.mark.parametrize(
    "scaling",
    [
        {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
        {"rope_type": "yarn", "factor": 40.0, "mscale": 0.707, "mscale_all_dim": 1.0, "beta_fast": 16, "beta_slow": 2},
        {"rope_type": "yarn", "factor": 8.0, "attention_factor": 1.5, "truncate": False},
        {"rope_type": "yarn", "factor": 1.0, "mscale": 1.0},
    ],
)
def test_yarn_attention_factor_agrees_with_transformers(scaling):
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    data = {**HUB["qwen2"], "rope_scaling": scaling}
    (rope,) = parse_config(data).ropes
    _, expected = ROPE_INIT_FUNCTIONS["yarn"](transformers.AutoConfig.for_model(**json.loads(json.dumps(data))), "cpu")
    assert rope.attention_factor == pytest.approx(expected, rel=1e-12)
    assert rope.kind == "yarn"
    assert rope.beta_fast == scaling.get("beta_fast", 32)
    assert rope.beta_slow == scaling.get("beta_slow", 1)
    assert rope.truncate is scaling.get("truncate", True)
    assert rope.original_max_positions == scaling.get("original_max_position_embeddings", 32768)


@pytest.mark.parametrize("family", TINY)
def test_configs_that_transformers_saves_are_read(family):
    config = load_config(tiny_checkpoint(family))
    assert (config.hidden_size, config.num_layers, config.num_kv_heads, config.dtype) == (32, 3, 2, "float32")


def test_llama3_rope():
    config = parse_config(HUB["llama3"])
    assert config.ropes == (
        RopeSpec(
            500000.0, 128, "llama3", factor=8.0, original_max_positions=8192, low_freq_factor=1.0, high_freq_factor=4.0
        ),
    )
    assert config.max_positions == 131072
    assert config.tied
    assert config.dtype == "bfloat16"


def test_context_is_stretched_where_the_config_states_the_unscaled_length():
    assert parse_config(HUB["llama_linear"]).max_positions == 4 * 4096
    assert parse_config(HUB["llama_dynamic"]).max_positions == 2 * 4096
    assert parse_config(HUB["llama_dynamic"]).ropes[0].original_max_positions == 4096
    assert parse_config(HUB["qwen2_yarn"]).max_positions == 4 * 32768
    assert parse_config(HUB["gemma3_linear"]).max_positions == 131072


def test_window_rules():
    assert windows("mistral_v1") == [4096] * 32
    assert windows("mistral_v3") == [None] * 32
    assert windows("qwen2") == [None] * 28
    assert windows("qwen2_windows") == [None] * 20 + [1024] * 8
    assert windows("qwen2_windows", max_window_layers=28) == [None] * 28
    assert windows("phi3_mini_4k") == [2047] * 32
    assert windows("gemma2", num_hidden_layers=5) == [4096, None, 4096, None, 4096]
    assert windows("gemma3_1b", num_hidden_layers=7) == [512] * 5 + [None, 512]
    assert windows("gemma3_1b", num_hidden_layers=4, sliding_window_pattern=2) == [512, None, 512, None]
    assert windows("gemma2", num_hidden_layers=2, layer_types=["full_attention"] * 2) == [None, None]
    assert windows("olmo2") == [None] * 32


def test_mistral_without_the_key_has_the_familys_default_window():
    data = {key: value for key, value in HUB["mistral_v1"].items() if key != "sliding_window"}
    assert parse_config(data).layers[0].window == 4096


def test_gemma_declares_its_differences():
    two, three = parse_config(HUB["gemma2"]), parse_config(HUB["gemma3_linear"])
    for config in (two, three):
        assert (config.norm_style, config.norm_plus_one, config.activation) == ("sandwich", True, "gelu_tanh")
        assert config.embedding_scale == math.sqrt(config.hidden_size)
        assert config.tied
    assert (two.attention_softcap, two.final_softcap, two.qk_norm) == (50.0, 30.0, None)
    assert (three.attention_softcap, three.final_softcap, three.qk_norm) == (None, None, "head")
    assert two.attention_scale == 144**-0.5
    assert three.ropes == (RopeSpec(1e6, 256, "linear", factor=8.0), RopeSpec(1e4, 256))
    assert [layer.rope for layer in three.layers[:7]] == [1, 1, 1, 1, 1, 0, 1]


def test_biases_and_norms():
    assert parse_config(HUB["llama_bias_head_dim"]).o_bias
    assert parse_config(HUB["llama_bias_head_dim"]).mlp_bias
    qwen = parse_config(HUB["qwen2"])
    assert (qwen.qkv_bias, qwen.o_bias, qwen.mlp_bias) == (True, False, False)
    olmo = parse_config(HUB["olmo2"])
    assert (olmo.norm_style, olmo.qk_norm) == ("post", "full")
    assert parse_config(HUB["qwen3"]).qk_norm == "head"


def test_partial_rotary_factor_in_both_forms():
    top = parse_config({**HUB["phi3_mini_4k"], "partial_rotary_factor": 0.5})
    inner = parse_config({**HUB["phi3_mini_4k"], "rope_parameters": {"partial_rotary_factor": 0.5}})
    assert top.ropes[0].rotary_dim == inner.ropes[0].rotary_dim == 48


def test_mixtures_of_experts():
    mixtral = parse_config(HUB["mixtral"])
    assert {layer.moe for layer in mixtral.layers} == {MoeSpec(8, 2, 14336, True)}
    qwen = parse_config(HUB["qwen3_moe_some_dense"])
    sparse = MoeSpec(16, 2, 768, False)
    assert [layer.moe for layer in qwen.layers] == [None, sparse, None, None, None, None, None, sparse]
    assert {layer.window for layer in qwen.layers} == {256}


def test_dtype_forms():
    data = {key: value for key, value in HUB["llama2"].items() if key != "torch_dtype"}
    assert parse_config(data).dtype == "float32"
    assert parse_config({**data, "dtype": "bfloat16"}).dtype == "bfloat16"
    assert parse_config({**data, "dtype": None, "torch_dtype": "float16"}).dtype == "float16"
    assert parse_config({**data, "torch_dtype": "torch.bfloat16"}).dtype == "bfloat16"


REFUSED = [
    ("llama2", {"architectures": ["GptOssForCausalLM"]}, "GptOssForCausalLM"),
    ("gemma3_1b", {"architectures": ["Gemma3ForConditionalGeneration"]}, "Gemma3ForConditionalGeneration"),
    ("llama2", {"architectures": None}, "architectures"),
    ("llama2", {"hidden_act": "relu"}, "hidden_act = 'relu'"),
    ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation = 'gelu'"),
    ("llama2", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    ("llama2", {"rope_scaling": {"rope_type": "longrope"}}, "rope_type = 'longrope'"),
    ("llama2", {"rope_scaling": {"type": "su"}}, "type = 'su'"),
    ("llama2", {"rope_scaling": {"type": "linear", "factor": 2.0, "mrope_section": [8]}}, "mrope_section"),
    ("llama2", {"rope_scaling": {"type": "linear"}}, "factor is missing"),
    ("llama2", {"rope_scaling": {"type": "linear", "factor": "2"}}, "factor = '2'"),
    ("llama2", {"rope_scaling": {"type": "linear", "factor": float("inf")}}, "factor"),
    ("llama2", {"rope_scaling": {"type": "linear", "factor": 1e308}}, "factor = 1e+308"),
    ("llama2", {"rope_scaling": {"type": "dynamic", "factor": 1e300}}, "factor = 1e+300"),
    ("qwen2", {"rope_scaling": {"type": "yarn", "factor": 2e6, "original_max_position_embeddings": 9}}, "factor = 2"),
    ("qwen2", {"rope_theta": 1}, "rope_theta = 1"),
    ("llama2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e-300}}, "rope_theta = 1e-300"),
    ("gemma3_1b", {"rope_local_base_freq": 1e31}, "rope_local_base_freq = 1e+31"),
    ("llama3", {"rope_scaling": {**HUB["llama3"]["rope_scaling"], "high_freq_factor": 1.0}}, "high_freq_factor"),
    ("phi3_mini_4k", {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}}, "longrope"),
    ("phi3_mini_4k", {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "yarn"),
    ("phi3_mini_4k", {"partial_rotary_factor": 1.5}, "partial_rotary_factor = 1.5"),
    ("llama2", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    ("gemma3_1b", {"rope_parameters": {"rope_type": "default"}}, "rope_parameters.rope_type"),
    ("gemma3_1b", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("llama2", {"attn_logit_softcapping": 30.0}, "attn_logit_softcapping"),
    ("gemma3_1b", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    ("mistral_v1", {"attention_bias": True}, "attention_bias"),
    ("qwen2", {"mlp_bias": True}, "mlp_bias"),
    ("mistral_v1", {"layer_types": ["full_attention"] * 32}, "layer_types"),
    ("qwen2", {"layer_types": ["sliding_attention"] * 28}, "layer_types"),
    ("qwen2", {"layer_types": ["full_attention"] * 27}, "layer_types"),
    ("gemma2", {"layer_types": ["chunked_attention"] * 46}, "chunked_attention"),
    ("gemma2", {"sliding_window": None}, "sliding_window"),
    ("llama2", {"dtype": "float8_e4m3fn"}, "float8_e4m3fn"),
    ("llama2", {"rms_norm_eps": 10**400}, "rms_norm_eps"),
    ("llama2", {"rms_norm_eps": 0.0}, "rms_norm_eps = 0.0"),
    ("llama2", {"rms_norm_eps": True}, "rms_norm_eps = True"),
    ("llama2", {"hidden_size": 0}, "hidden_size = 0"),
    ("llama2", {"hidden_size": None}, "hidden_size is missing"),
    ("llama2", {"hidden_size": True}, "hidden_size = True"),
    ("llama2", {"hidden_size": 4097}, "hidden_size = 4097"),
    ("llama2", {"num_key_value_heads": 5}, "num_key_value_heads = 5"),
    ("llama2", {"num_hidden_layers": 10**9}, "num_hidden_layers"),
    ("llama2", {"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
    ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok = 9"),
]


@pytest.mark.parametrize(("name", "changes", "says"), REFUSED)
def test_what_is_not_supported_is_refused_by_name(name, changes, says):
    parse_config(HUB[name])
    with pytest.raises(ModelError, match=r"config\.json") as error:
        parse_config({**HUB[name], **changes})
    assert says in str(error.value)


def test_neutral_values_of_unsupported_features_are_accepted():
    neutral = {"quantization_config": None, "use_bidirectional_attention": False, "attn_logit_softcapping": None}
    assert parse_config({**HUB["llama2"], **neutral}) == parse_config(HUB["llama2"])


def test_config_files_that_are_none(tmp_path):
    with pytest.raises(ModelError, match=r"no config\.json"):
        load_config(tmp_path)
    path = tmp_path / "config.json"
    for text in ("{", "[]", "[" * 100_000, '{"architectures": 1' + "1" * 5000 + "}"):
        path.write_text(text)
        with pytest.raises(ModelError, match=r"config\.json"):
            load_config(tmp_path)


def test_a_config_is_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        parse_config(HUB["llama2"]).hidden_size = 1
