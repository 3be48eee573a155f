import pytest

from helixd.layers import LayerRange
from helixd.model.config import load_config, parse_config
from helixd.model.index import SafetensorsIndex
from helixd.model.names import TensorSpec, embedding_weights, head_weights, layer_weights
from helixd.model.sizes import check_tensors, embedding_bytes, head_bytes, layer_bytes, required_tensors
from tests.unit.model_families import HUB, TINY, tiny_checkpoint


@pytest.mark.parametrize("family", TINY)
def test_every_tensor_of_a_saved_model_is_claimed_once_with_its_shape(family):
    model_dir = tiny_checkpoint(family)
    config = load_config(model_dir)
    groups = [layer_weights(config, layer) for layer in range(config.num_layers)]
    groups.append(head_weights(config))
    if not config.tied:
        groups.append(embedding_weights(config))
    claimed = [spec for group in groups for parts in group.values() for spec in parts]
    assert len({spec.name for spec in claimed}) == len(claimed)
    with SafetensorsIndex.open(model_dir) as index:
        assert {spec.name: spec.shape for spec in claimed} == {n: ref.shape for n, ref in index.tensors.items()}
        check_tensors(index.tensors, config)
        total = sum(ref.nbytes for ref in index.tensors.values())
    assert sum(layer_bytes(config)) + head_bytes(config) + (0 if config.tied else embedding_bytes(config)) == total


def test_logical_weights_of_a_fused_and_a_separate_checkpoint_have_the_same_rows():
    for name in ("phi3_mini_4k", "llama2"):
        config = parse_config(HUB[name])
        weights = layer_weights(config, 3)
        assert sum(spec.shape[0] for spec in weights["qkv"]) == 3 * config.hidden_size
        assert sum(spec.shape[0] for spec in weights["gate_up"]) == 2 * config.intermediate_size
    assert [spec.name.split(".")[-2] for spec in weights["qkv"]] == ["q_proj", "k_proj", "v_proj"]
    assert [spec.name.split(".")[-2] for spec in weights["gate_up"]] == ["gate_proj", "up_proj"]


def test_mixtral_experts_keep_gate_before_up():
    weights = layer_weights(parse_config(HUB["mixtral"]), 0)
    prefix = "model.layers.0.block_sparse_moe"
    assert weights["router"] == (TensorSpec(f"{prefix}.gate.weight", (8, 4096)),)
    assert weights["expert.7.gate_up"] == (
        TensorSpec(f"{prefix}.experts.7.w1.weight", (14336, 4096)),
        TensorSpec(f"{prefix}.experts.7.w3.weight", (14336, 4096)),
    )
    assert weights["expert.7.down"] == (TensorSpec(f"{prefix}.experts.7.w2.weight", (4096, 14336)),)


def test_norms_by_style():
    def norms(name):
        return {
            k: v[0].name.split(".")[-2] for k, v in layer_weights(parse_config(HUB[name]), 0).items() if "norm" in k
        }

    assert norms("llama2") == {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    assert norms("olmo2") == {
        "attention_post_norm": "post_attention_layernorm",
        "mlp_post_norm": "post_feedforward_layernorm",
        "q_norm": "q_norm",
        "k_norm": "k_norm",
    }
    assert norms("gemma2")["mlp_norm"] == "pre_feedforward_layernorm"


def test_a_tied_head_is_the_embedding():
    config = parse_config(HUB["llama3"])
    assert head_weights(config)["head"] == embedding_weights(config)["embedding"]
    assert "lm_head.weight" not in required_tensors(config)


def test_a_stage_needs_only_its_own_tensors():
    config = parse_config(HUB["mistral_v1"])
    names = required_tensors(config, LayerRange(4, 6), with_embedding=False, with_head=False)
    assert {name.split(".")[2] for name in names} == {"4", "5"}
    assert "model.embed_tokens.weight" in required_tensors(config, LayerRange(0, 1), with_head=False)


def test_layer_numbers_outside_the_model_are_refused():
    config = parse_config(HUB["llama2"])
    layer_weights(config, 31)
    for layer in (-1, 32):
        with pytest.raises(IndexError):
            layer_weights(config, layer)


def test_sizes_of_a_known_model():
    """Mistral 7B has 7 241 732 096 parameters."""
    config = parse_config(HUB["mistral_v1"])
    parameters = 7_241_732_096
    assert sum(layer_bytes(config)) + embedding_bytes(config) + head_bytes(config) == 2 * parameters
    assert sum(layer_bytes(config, "float32")) == 2 * sum(layer_bytes(config))
