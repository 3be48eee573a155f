"""The daemon's settings: declared once in `sections`, read from file, environment and flags by `load`.

`load_config` gives a frozen `Config` or raises `ConfigErrors` with everything that is wrong. Reads no model and
opens no socket.
"""

from helixd.config.address import Address
from helixd.config.kinds import DEMO_MODEL
from helixd.config.load import Loaded, load, load_config
from helixd.config.problems import ConfigErrors, Problem
from helixd.config.sections import (
    ApiConfig,
    ApiLimits,
    ClusterConfig,
    ClusterTimers,
    Config,
    DeviceConfig,
    EngineConfig,
    LogConfig,
    MetricsConfig,
    ModelConfig,
    NodeConfig,
    PinConfig,
    PlannerConfig,
    Role,
)
from helixd.config.sources import Override

__all__ = [
    "DEMO_MODEL",
    "Address",
    "ApiConfig",
    "ApiLimits",
    "ClusterConfig",
    "ClusterTimers",
    "Config",
    "ConfigErrors",
    "DeviceConfig",
    "EngineConfig",
    "Loaded",
    "LogConfig",
    "MetricsConfig",
    "ModelConfig",
    "NodeConfig",
    "Override",
    "PinConfig",
    "PlannerConfig",
    "Problem",
    "Role",
    "load",
    "load_config",
]
