"""How long a step takes on an emulated device, from the layer times of its profile. Pure arithmetic.

At a layer the batch is everybody whose range has it: prompt time of all prompt tokens together plus decode time of
the number of decodes, and never less than a decode batch of two, below which the profiles were not measured.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from helixd.layers import LayerRange
from helixd.plan.cluster.profile import layer_time_s
from helixd.plan.cluster.spec import NodeProfile

# Rows that enter a node are copied to its memory and to its device (measured by the paper's artifact).
ENTER_S_PER_BYTE = 1 / 4e9 + 1 / 5e9
_LEAST_DECODES = 2.0


class Share(NamedTuple):
    """One sequence's part of a step: `tokens` through `layers`. One token is a decode."""

    layers: LayerRange
    tokens: int


def step_s(profile: NodeProfile, shares: Sequence[Share], row_bytes: int) -> float:
    """Seconds that a batch of these shares takes."""
    bounds = sorted({bound for share in shares for bound in share.layers.to_pair()})
    total = sum(share.tokens for share in shares) * row_bytes * ENTER_S_PER_BYTE
    least = layer_time_s(profile.decode_layer_time_s, _LEAST_DECODES)
    for start, end in pairwise(bounds):
        active = [share.tokens for share in shares if share.layers.start <= start < share.layers.end]
        prompt = sum(tokens for tokens in active if tokens > 1)
        decodes = sum(1 for tokens in active if tokens == 1)
        seconds = layer_time_s(profile.prompt_layer_time_s, prompt) if prompt else 0.0
        seconds += layer_time_s(profile.decode_layer_time_s, decodes) if decodes else 0.0
        if active:
            total += (end - start) * max(least, seconds)
    return total
