"""A checkpoint's config.json as what the planner needs of a model. Reads no weights and no tensor headers."""

from helixd.commands.failure import CommandFailed
from helixd.errors import ModelError
from helixd.exits import Exit
from helixd.files import served_name
from helixd.model.checkpoint import resolve_model
from helixd.model.config import load_config
from helixd.model.decoder import DTYPE_BYTES, DecoderConfig
from helixd.model.sizes import embedding_bytes, head_bytes, layer_bytes
from helixd.plan.cluster.spec import LayerWork, ModelSpec

# What the peer protocol carries for one token id.
TOKEN_BYTES = 4


def model_of(model: str) -> ModelSpec:
    """The model in a checkpoint's directory, or "demo". Raises CommandFailed."""
    try:
        directory = resolve_model(model)
        return model_spec(model if model == "demo" else served_name(directory), load_config(directory))
    except ModelError as error:
        raise CommandFailed(str(error), Exit.BAD_MODEL) from error


def model_spec(name: str, config: DecoderConfig) -> ModelSpec:
    """Sizes of a decoder in its own dtype; layers of unequal size count as the largest."""
    width = DTYPE_BYTES[config.dtype]
    sizes = layer_bytes(config)
    largest = sizes.index(max(sizes))
    moe = config.layers[largest].moe
    expert_bytes, share = 0.0, 1.0
    if moe is not None:
        # Gate, up and down of every expert.
        expert_bytes = 3.0 * config.hidden_size * moe.intermediate_size * moe.num_experts * width
        share = moe.top_k / moe.num_experts
    used_weights = (sizes[largest] - expert_bytes * (1 - share)) / width
    return ModelSpec(
        name=name,
        num_layers=config.num_layers,
        layer_bytes=sizes[largest],
        activation_bytes=config.hidden_size * width,
        token_bytes=TOKEN_BYTES,
        embedding_bytes=embedding_bytes(config),
        head_bytes=head_bytes(config),
        work=LayerWork(
            kv_bytes_per_token=config.kv_bytes_per_token_layer,
            flops_per_token=2 * used_weights,
            dtype=config.dtype,
            expert_bytes=expert_bytes,
            expert_share=share,
        ),
    )
