"""How the demo model's parameters move: Muon for the matrices of the layers, AdamW for the embedding and the norms.

Muon (Keller Jordan, "Muon: an optimizer for hidden layers in neural networks", 2024) makes each momentum matrix nearly
orthogonal by a Newton-Schulz iteration, which learns from fewer tokens than AdamW. `torch.optim.Muon` works matrix by
matrix in bfloat16; here all matrices of one shape go through the iteration together in float32, which costs less than
half the time on a CPU without bfloat16 tiles. Knows no schedule: the caller scales the rates.
"""

from collections import defaultdict

import torch
from torch import Tensor, nn

_MUON_RATE = 0.02
_MUON_MOMENTUM = 0.95
_MUON_DECAY = 0.05
_ADAM_RATE = 0.005
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_NEWTON_SCHULZ_STEPS = 5


def orthogonalize(matrices: Tensor) -> Tensor:
    """The nearly orthogonal factor of each of `[count, rows, columns]`, rows <= columns."""
    a, b, c = _NEWTON_SCHULZ
    x: Tensor = matrices / (matrices.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    for _ in range(_NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class Optimizer:
    """Owns the optimizer state of one network, by parameter name."""

    def __init__(self, network: nn.Module) -> None:
        self._matrices: dict[str, nn.Parameter] = {}
        self._others: dict[str, nn.Parameter] = {}
        for name, parameter in network.named_parameters():
            is_layer_matrix = parameter.dim() == 2 and name.startswith("layers.")
            (self._matrices if is_layer_matrix else self._others)[name] = parameter
        self._momentum = {name: torch.zeros_like(parameter) for name, parameter in self._matrices.items()}
        self._adam = torch.optim.AdamW(self._others.values(), lr=_ADAM_RATE, betas=(0.9, 0.95), weight_decay=0.0)

    @torch.no_grad()
    def step(self, scale: float) -> None:
        """Apply the gradients with all rates multiplied by `scale`, then clear them."""
        for group in self._adam.param_groups:
            group["lr"] = _ADAM_RATE * scale
        self._adam.step()
        by_shape: dict[tuple[int, int], list[tuple[nn.Parameter, Tensor]]] = defaultdict(list)
        for name, parameter in self._matrices.items():
            if parameter.grad is None:
                raise RuntimeError(f"{name} has no gradient: run backward() before step()")
            momentum = self._momentum[name].lerp_(parameter.grad, 1 - _MUON_MOMENTUM)
            update = parameter.grad.lerp(momentum, _MUON_MOMENTUM)
            wide = update if update.shape[0] <= update.shape[1] else update.T
            by_shape[(wide.shape[0], wide.shape[1])].append((parameter, wide))
        for same_shape in by_shape.values():
            updates = orthogonalize(torch.stack([wide for _, wide in same_shape]))
            for (parameter, _), wide in zip(same_shape, updates, strict=True):
                rows, columns = parameter.shape
                rate = _MUON_RATE * scale * max(1.0, rows / columns) ** 0.5
                parameter.mul_(1 - _MUON_RATE * scale * _MUON_DECAY)
                parameter.sub_(wide if rows <= columns else wide.T, alpha=rate)
        for parameter in (*self._matrices.values(), *self._others.values()):
            parameter.grad = None

    def state(self) -> dict[str, Tensor]:
        """All state as named tensors, for a safetensors file."""
        tensors = {f"muon.{name}": momentum for name, momentum in self._momentum.items()}
        for name, parameter in self._others.items():
            for key, value in self._adam.state[parameter].items():
                tensors[f"adam.{key}.{name}"] = value
        return tensors

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `state` returned. Raises KeyError if a tensor is missing."""
        for name, momentum in self._momentum.items():
            momentum.copy_(tensors[f"muon.{name}"])
        for name, parameter in self._others.items():
            self._adam.state[parameter] = {
                key: tensors[f"adam.{key}.{name}"].clone() for key in ("step", "exp_avg", "exp_avg_sq")
            }
