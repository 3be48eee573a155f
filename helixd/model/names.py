"""Which checkpoint tensors make up each weight of a layer, of the embedding and of the head, with their shapes.

A *logical weight* is the concatenation along dimension 0 of its parts, so that fused and separate checkpoints look
alike to the engine. Logical names of a layer (a missing key means the family has no such weight):

    attention_norm, attention_post_norm, mlp_norm, mlp_post_norm      norms before and after each half, [hidden]
    qkv, qkv_bias, o, o_bias                                          q rows, then k rows, then v rows
    q_norm, k_norm                                                    [head_dim] (`head`) or the width of q, of k (`full`)
    gate_up, gate_up_bias, down, down_bias                            gate rows, then up rows
    router, expert.E.gate_up, expert.E.down                           mixture of experts, E from 0

Outside the layers: embedding (needed where a sequence enters at layer 0), final_norm and head (needed where it
leaves; for tied embeddings `head` is the embedding's tensor).
"""

from dataclasses import dataclass

from helixd.model.decoder import DecoderConfig


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A checkpoint tensor by name and the shape it must have."""

    name: str
    shape: tuple[int, ...]


def layer_weights(config: DecoderConfig, layer: int) -> dict[str, tuple[TensorSpec, ...]]:
    """The logical weights of one decoder layer, each as its parts in order."""
    raise NotImplementedError


def embedding_weights(config: DecoderConfig) -> dict[str, tuple[TensorSpec, ...]]:
    """`embedding`."""
    raise NotImplementedError


def head_weights(config: DecoderConfig) -> dict[str, tuple[TensorSpec, ...]]:
    """`final_norm` and `head`."""
    raise NotImplementedError
