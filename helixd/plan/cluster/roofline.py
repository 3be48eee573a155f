"""How long a layer takes on hardware that nobody measured: the larger of moving its bytes and doing its sums.

Estimates, for planning before there is a cluster; they are marked as such wherever they are shown, and what is
measured replaces them. Against the published layer times of LLaMA-2 70B on A100, V100, L4 and T4 they are within a
factor of 1.7 (`tests/unit/test_plan_roofline.py`).
"""

from helixd.plan.cluster.hardware import Hardware
from helixd.plan.cluster.profile import NodeMeasurement
from helixd.plan.cluster.spec import LayerWork, ModelSpec, WorkloadSpec

# What kernels reach of the printed rates: matrix products of a few hundred rows, and reading weights.
_ARITHMETIC = 0.5
_READING = 0.8
# Launching a layer's kernels, and what else does not scale.
_OVERHEAD_S = 5e-5

PROMPT_TOKENS = (1, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
DECODE_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


def estimate(
    hardware: Hardware,
    model: ModelSpec,
    work: LayerWork,
    workload: WorkloadSpec,
    *,
    memory_bytes: float | None = None,
    type_name: str = "",
) -> NodeMeasurement:
    """What the device would report, if it did as its datasheet lets expect.

    `memory_bytes`: for weights and KV together; None: the usable share of what the device has. Raises ValueError if
    neither is known.
    """
    if memory_bytes is None:
        if hardware.memory_bytes is None:
            raise ValueError(f"{hardware.name} is sold with different memories")
        memory_bytes = hardware.memory_bytes * hardware.usable
    # A step reads the KV cache of every sequence in it; half of the output is there on average.
    context = workload.mean_input_tokens + workload.mean_output_tokens / 2
    reading = hardware.bandwidth_bytes_per_s * _READING

    def layer_s(tokens: float) -> float:
        sums_s = tokens * work.flops_per_token / (hardware.rate(work.dtype) * _ARITHMETIC)
        return max(sums_s, _bytes_read(model.layer_bytes, work, tokens) / reading) + _OVERHEAD_S

    return NodeMeasurement(
        type=type_name or hardware.name,
        memory_bytes=memory_bytes,
        prompt_layer_time_s=tuple((float(n), layer_s(n)) for n in PROMPT_TOKENS),
        decode_layer_time_s=tuple(
            (float(n), layer_s(n) + n * context * work.kv_bytes_per_token / reading) for n in DECODE_BATCHES
        ),
    )


def _bytes_read(layer_bytes: float, work: LayerWork, tokens: float) -> float:
    """Weights that a batch of `tokens` touches: all of a dense layer, of a sparse one the experts that are drawn."""
    drawn: float = 1 - (1 - work.expert_share) ** tokens
    return layer_bytes - work.expert_bytes + work.expert_bytes * drawn
