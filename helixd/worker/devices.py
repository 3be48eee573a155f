"""The devices of this machine that helixd may use, each as a node with a memory budget. Asks torch only."""

import platform

import torch

from helixd.engine.memory import device_memory, runtime_bytes
from helixd.errors import ConfigError
from helixd.ids import NodeId, PeerId
from helixd.worker.backend import NodeSetup

AUTO_SHARE = 0.9


def node_setups(
    peer: PeerId, devices: tuple[str, ...], memory_bytes: int | None, threads: int
) -> list[NodeSetup]:  # fmt: skip
    """One node per device (none named: every GPU, else the CPU).

    `memory_bytes` is for weights and KV cache together, per node; None takes most of what is free now, less what the
    process itself needs. Raises ConfigError for a device that torch does not have.
    """
    named = devices or _every_device()
    setups = []
    for number, device in enumerate(named):
        try:
            memory = device_memory(device)
            budget = memory_bytes
            if budget is None:
                free = int(memory.free_bytes * AUTO_SHARE) - runtime_bytes(device)
                budget = max(0, free // (len(named) if device == "cpu" else 1))
            name = _device_name(device)
        except (RuntimeError, AssertionError) as error:
            why = str(error).splitlines()[0]
            raise ConfigError(
                f"device {device!r} cannot be used: {why}; torch has: {', '.join(_every_device())}"
            ) from error
        node = NodeId(peer if len(named) == 1 else f"{peer}.{number}")
        setups.append(NodeSetup(node, device, name, memory.total_bytes, budget, threads))
    return setups


def _every_device() -> tuple[str, ...]:
    count = torch.cuda.device_count()
    return tuple(f"cuda:{number}" for number in range(count)) or ("cpu",)


def _device_name(device: str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(torch.device(device))
    return platform.processor() or platform.machine()
