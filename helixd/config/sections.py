"""Every setting of helixd: declared here once, with its type, unit, default and meaning.

An attribute's unit suffix (`_s`, `_bytes`) is not part of the key's name in TOML: `ping_s` is `ping = "500ms"`.
"""
# ruff: noqa: RUF009 (`key` and `section` are dataclass field specifiers)

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from helixd.config import kinds
from helixd.config.address import Address
from helixd.config.schema import entries, key, section
from helixd.layers import LayerRange

Role = Literal["", "coordinator", "worker"]
LogFormat = Literal["auto", "text", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]
ModelDType = Literal["auto", "float32", "float16", "bfloat16"]


@dataclass(frozen=True, slots=True)
class NodeConfig:
    """This daemon's identity and its directories."""

    # A worker beside a coordinator, and one with several devices, make longer names of it; a peer's has 200 bytes.
    id: str = key("", kinds.name(180), "Identity in the cluster. Empty: made once and kept in state_dir.")
    name: str = key("", kinds.name(255), "Name for people, in logs and /cluster. Empty: the host's name.")
    state_dir: Path = key(
        kinds.UNSET_PATH, kinds.PATH,
        "Where identity, measurements and the last epoch are kept. Empty: $STATE_DIRECTORY, else"
        " $XDG_STATE_HOME/helixd, else ~/.local/state/helixd.",
    )  # fmt: skip
    cache_dir: Path = key(
        kinds.UNSET_PATH, kinds.PATH,
        "Where weights fetched from the coordinator are kept. Empty: $CACHE_DIRECTORY, else"
        " $XDG_CACHE_HOME/helixd, else ~/.cache/helixd.",
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class LogConfig:
    """Logs go to standard error, one event per line; never prompts, texts or keys."""

    level: LogLevel = key("info", kinds.choice("debug", "info", "warning", "error"), "Least severe level shown.")
    format: LogFormat = key(
        "auto", kinds.choice("auto", "text", "json"), "text: key=value lines. auto: text on a terminal, else json."
    )


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The model the coordinator serves."""

    path: str = key(
        "", kinds.MODEL,
        'Directory of a Hugging Face checkpoint, or "demo" for the small model in the package. The coordinator needs'
        " it; a worker may leave it empty.",
    )  # fmt: skip
    name: str = key(
        "", kinds.name(255),
        "Name clients ask for. Empty: the directory's name, or org/name for a snapshot in a Hugging Face cache.",
    )  # fmt: skip
    dtype: ModelDType = key(
        "auto", kinds.choice("auto", "float32", "float16", "bfloat16"),
        "Type the weights are held and computed in. auto: the checkpoint's own.",
    )  # fmt: skip
    max_context_tokens: int = key(
        0, kinds.integer(0), "Prompt and output of one request together, at most. 0: what the model allows."
    )


@dataclass(frozen=True, slots=True)
class ApiLimits:
    """What clients may ask for at most. A request over a limit is answered with an error that names it."""

    body_bytes: int = key(4 * 2**20, kinds.size(1024), "Largest request body.")
    n: int = key(8, kinds.integer(1, 128), "Most choices per request.")
    queue: int = key(
        256,
        kinds.integer(0),
        "Choices (a request has n per prompt) that may wait for room; a request with one more is a 429.",
    )
    per_key_in_flight: int = key(64, kinds.integer(1), "Requests of one key that may wait or run at once.")
    request_s: float = key(600.0, kinds.duration(), "Longest a request may take, waiting included.")
    write_stall_s: float = key(30.0, kinds.duration(), "A client that reads nothing for this long is disconnected.")
    keep_alive_s: float = key(10.0, kinds.duration(), "Interval between comments on a stream that has nothing to say.")
    connections: int = key(1024, kinds.integer(1), "Open client connections.")


@dataclass(frozen=True, slots=True)
class ApiTls:
    """TLS for the API. With it clients use https; they show API keys, not certificates."""

    cert: Path | None = key(
        None, kinds.OPTIONAL_PATH, "Certificate, with those between it and its authority, PEM. Empty: no TLS."
    )
    key: Path | None = key(None, kinds.OPTIONAL_PATH, "Its private key without a passphrase, PEM, mode 0600.")

    @property
    def on(self) -> bool:
        """Whether the API speaks TLS."""
        return self.cert is not None


@dataclass(frozen=True, slots=True)
class ApiConfig:
    """The OpenAI-compatible HTTP API. The coordinator serves it."""

    listen: Address = key(Address("127.0.0.1", 8080), kinds.ADDRESS, "Where the API listens.")
    keys_file: Path | None = key(
        None, kinds.OPTIONAL_PATH,
        "File with one API key per line, mode 0600. Needed when listen is not loopback. Empty:"
        " $CREDENTIALS_DIRECTORY/api-keys if that exists, else no key is asked for.",
    )  # fmt: skip
    cors_origins: tuple[str, ...] = key((), kinds.STRINGS, "Browser origins that may call the API. Empty: none.")
    insecure_open: bool = key(False, kinds.BOOLEAN, "Serve a non-loopback address without keys, to anybody.")
    limits: ApiLimits = section(ApiLimits)
    tls: ApiTls = section(ApiTls)


@dataclass(frozen=True, slots=True)
class ClusterTimers:
    """How long things may take between daemons."""

    ping_s: float = key(0.5, kinds.duration(), "Interval between liveness pings.")
    dead_after_s: float = key(3.0, kinds.duration(), "A peer that answers no ping for this long is lost.")
    send_s: float = key(30.0, kinds.duration(), "A peer that takes no data for this long is lost.")
    step_s: float = key(
        60.0,
        kinds.duration(),
        "Longest one step of a sequence may take before its route is given up, for each 512 tokens of prompts that are"
        " computed first, its own among them. On a worker: a device whose step takes"
        " longer, and far longer than its others, hangs.",
    )
    failover_wait_s: float = key(
        30.0, kinds.duration(), "Longest a broken request waits for a new route before it fails."
    )
    max_migrations: int = key(3, kinds.integer(0), "How often one sequence may move to another route.")
    drain_s: float = key(120.0, kinds.duration(zero=True), "Longest a stopping daemon waits for running requests.")
    join_retry_max_s: float = key(5.0, kinds.duration(), "Longest pause between a worker's tries to join.")


@dataclass(frozen=True, slots=True)
class ClusterTls:
    """TLS between daemons: links are encrypted, and each side shows a certificate.

    With it no secret is needed; if there is one, both are asked for. All three keys, or none.
    """

    ca: Path | None = key(
        None, kinds.OPTIONAL_PATH, "The cluster's own authority, PEM. Whoever it signed may join. Empty: no TLS."
    )
    cert: Path | None = key(
        None, kinds.OPTIONAL_PATH, "This daemon's certificate, PEM. node.id is a DNS name in its subjectAltName."
    )
    key: Path | None = key(None, kinds.OPTIONAL_PATH, "Its private key without a passphrase, PEM, mode 0600.")

    @property
    def on(self) -> bool:
        """Whether links use TLS."""
        return self.ca is not None


@dataclass(frozen=True, slots=True)
class ClusterConfig:
    """The links between daemons."""

    listen: Address = key(
        kinds.UNSET_ADDRESS, kinds.ADDRESS,
        "Where other daemons connect. Empty: 127.0.0.1:7070 on the coordinator; on a worker 127.0.0.1 and any free"
        " port if its coordinator is on this machine, else 0.0.0.0:7071.",
    )  # fmt: skip
    coordinator: Address | None = key(
        None, kinds.OPTIONAL_ADDRESS, "The coordinator's peer address. A worker needs it."
    )
    advertise: Address | None = key(
        None, kinds.OPTIONAL_ADDRESS,
        "Address other workers should use for this one. Empty: where its connections come from, and listen's port.",
    )  # fmt: skip
    secret_file: Path | None = key(
        None, kinds.OPTIONAL_PATH,
        "File with the secret all daemons of the cluster share, mode 0600. Needed when listen is not loopback and there"
        " is no cluster.tls. Empty: $CREDENTIALS_DIRECTORY/cluster-secret if that exists, else no secret.",
    )  # fmt: skip
    insecure_open: bool = key(
        False, kinds.BOOLEAN, "Let any daemon join over a non-loopback address without secret or TLS."
    )
    chunk_bytes: int = key(256 * 2**10, kinds.size(4096, 16 * 2**20), "Activations travel in pieces of this size.")
    window_bytes: int = key(
        16 * 2**20, kinds.size(4096), "Bytes a link may have under way before the receiver must have taken some."
    )
    probe_bytes: int = key(
        4 * 2**20, kinds.size(64 << 10), "Bytes one measurement of a link's bandwidth sends, at most."
    )
    timers: ClusterTimers = section(ClusterTimers)
    tls: ClusterTls = section(ClusterTls)


@dataclass(frozen=True, slots=True)
class DeviceConfig:
    """What this daemon computes on. Each device is one node of the cluster."""

    devices: tuple[str, ...] = key(
        (), kinds.DEVICES,
        'Torch devices, as in ["cpu"] or ["cuda:0", "cuda:1"]. "auto": every GPU, else the CPU. ["emulated:TYPE"]: a'
        " type of node in emulation.cluster_file, which takes the time and computes nothing.",
    )  # fmt: skip
    memory_bytes: int | None = key(
        None, kinds.MEMORY,
        "Memory of each node for weights and KV cache together. Beside it the process itself takes up to 512 MiB."
        ' "auto": most of what is free.',
    )  # fmt: skip
    threads: int = key(0, kinds.integer(0, 4096), "Threads that compute on a CPU. 0: torch's choice.")


@dataclass(frozen=True, slots=True)
class EmulationConfig:
    """A worker that stands for a machine of a cluster file, to rehearse a plan without the hardware."""

    cluster_file: Path | None = key(
        None, kinds.OPTIONAL_PATH, "The cluster (format helixd-cluster/1) that has this worker's node.id and its links."
    )
    time_scale: float = key(
        1.0, kinds.number(0.001, 1000), "How long a second of the file lasts: computing and links are slower by this."
    )


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How requests are batched on a node. The coordinator's values hold for every worker."""

    max_batch_sequences: int = key(64, kinds.integer(1), "Sequences in one step.")
    max_batch_tokens: int = key(512, kinds.integer(1), "Tokens in one step, decode and prefill together.")
    prefill_chunk_tokens: int = key(128, kinds.integer(1), "A longer prompt is computed in chunks of this size.")
    kv_fraction: float = key(
        0.3, kinds.number(0.01, 0.95), "Share of a node's memory kept for KV cache when layers are placed."
    )


@dataclass(frozen=True, slots=True)
class PinConfig:
    """Constraints on one node, by its id. Left out: none."""

    min_layers: int | None = key(None, kinds.OPTIONAL_INTEGER, "It holds at least so many layers.")
    max_layers: int | None = key(None, kinds.OPTIONAL_INTEGER, "It holds at most so many layers.")
    range: LayerRange | None = key(None, kinds.LAYER_RANGE, "It holds exactly the layers start <= layer < end.")
    exclude: bool = key(False, kinds.BOOLEAN, "It holds nothing.")


@dataclass(frozen=True, slots=True)
class PlannerConfig:
    """How layers are placed on nodes. The coordinator plans."""

    time_limit_s: float = key(10.0, kinds.duration(), "Longest one search for a placement may take.")
    simulate: bool = key(
        False, kinds.BOOLEAN,
        "While no node holds layers: simulate the best plans found, in what is left of the time limit, and take the"
        " best of them. Worth some percent.",
    )  # fmt: skip
    replan_gain: float = key(
        0.1, kinds.number(0, 10), "Move layers only if that is predicted to raise throughput by this share."
    )
    replan_cooldown_s: float = key(60.0, kinds.duration(zero=True), "Least time between two plans that move layers.")
    drift_factor: float = key(
        2.0, kinds.number(1.1, 1000),
        "A node whose layers take so many times longer (or shorter) than planned with, or a link that carries so many"
        " times less (or more), has drifted: a plan is made with what is measured.",
    )  # fmt: skip
    drift_hold_s: float = key(60.0, kinds.duration(), "It has only drifted when it was off for longer than this.")
    wait_for_nodes: int = key(1, kinds.integer(1), "Nodes that must have joined before the first plan.")
    settle_s: float = key(1.0, kinds.duration(zero=True), "Wait for further nodes after one joined, before planning.")
    load_speed_bytes: int = key(
        500 * 2**20, kinds.size(1 << 20), "Weights that a node loads in a second: what moving layers costs."
    )
    horizon_s: float = key(
        3600.0, kinds.duration(), "How long a plan is expected to stay. Layers move if that pays within it."
    )
    mean_input_tokens: float = key(750.0, kinds.number(1, 1e7), "Mean prompt length planned for.")
    mean_output_tokens: float = key(240.0, kinds.number(1, 1e7), "Mean output length planned for.")
    pins: Mapping[str, PinConfig] = entries(PinConfig, "Constraints on one node, by its id.")


@dataclass(frozen=True, slots=True)
class MetricsConfig:
    """Prometheus metrics at /metrics."""

    vllm_names: bool = key(True, kinds.BOOLEAN, "Also export the metrics that vLLM has too, under vLLM's names.")


@dataclass(frozen=True, slots=True)
class Config:
    """Settings of helixd. Flags beat the environment, which beats this file, which beats the defaults shown."""

    role: Role = key(
        "", kinds.choice("", "coordinator", "worker"),
        'What this daemon is. Empty: both in one process, on one machine.',
    )  # fmt: skip
    node: NodeConfig = section(NodeConfig)
    log: LogConfig = section(LogConfig)
    model: ModelConfig = section(ModelConfig)
    api: ApiConfig = section(ApiConfig)
    cluster: ClusterConfig = section(ClusterConfig)
    device: DeviceConfig = section(DeviceConfig)
    emulation: EmulationConfig = section(EmulationConfig)
    engine: EngineConfig = section(EngineConfig)
    planner: PlannerConfig = section(PlannerConfig)
    metrics: MetricsConfig = section(MetricsConfig)

    @property
    def coordinates(self) -> bool:
        """Whether this daemon runs the coordinator role."""
        return self.role != "worker"

    @property
    def computes(self) -> bool:
        """Whether this daemon runs the worker role."""
        return self.role != "coordinator"
