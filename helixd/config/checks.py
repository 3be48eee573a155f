"""What no single key can tell: settings that contradict each other, and files that must exist and be private."""

import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

from helixd.config.kinds import DEMO_MODEL
from helixd.config.schema import KeyPath
from helixd.config.sections import Config, PinConfig

MIN_SECRET_BYTES = 32

Finding = tuple[tuple[KeyPath, ...], str]
"""The keys a problem rests on, the one to blame first, and what is wrong."""


def check(config: Config, env: Mapping[str, str]) -> Iterator[Finding]:
    """Every contradiction in a derived configuration."""
    yield from _role(config)
    yield from _exposure(config)
    yield from _private_file(("cluster", "secret_file"), config.cluster.secret_file, MIN_SECRET_BYTES, env)
    yield from _private_file(("api", "keys_file"), config.api.keys_file, 1, env)
    yield from _tls(
        ("cluster", "tls"), {"ca": config.cluster.tls.ca, "cert": config.cluster.tls.cert}, config.cluster.tls.key, env
    )
    yield from _tls(("api", "tls"), {"cert": config.api.tls.cert}, config.api.tls.key, env)
    yield from _limits(config)
    for name, pin in config.planner.pins.items():
        yield from _pin(("planner", "pins", name), pin)


def _role(config: Config) -> Iterator[Finding]:
    path, coordinator = ("model", "path"), ("cluster", "coordinator")
    if config.role == "worker" and config.cluster.coordinator is None:
        yield (coordinator, ("role",)), "a worker needs cluster.coordinator (--coordinator HOST:PORT)"
    if config.role == "" and config.cluster.coordinator is not None:
        yield (
            (coordinator, ("role",)),
            'cluster.coordinator names another daemon, but role is empty; set role = "worker" to join it',
        )
    if config.coordinates and not config.model.path:
        yield (path, ("role",)), "a coordinator needs model.path (--model PATH, or --model demo)"
    elif config.model.path not in ("", DEMO_MODEL) and not Path(config.model.path).is_dir():
        yield (path,), f"model.path: {config.model.path} is not a directory"


def _exposure(config: Config) -> Iterator[Finding]:
    cluster, api = config.cluster, config.api
    if not (cluster.listen.loopback or cluster.secret_file or cluster.tls.on or cluster.insecure_open):
        yield (
            (
                ("cluster", "listen"),
                ("cluster", "secret_file"),
                ("cluster", "insecure_open"),
                ("cluster", "coordinator"),
            ),
            f"cluster.listen is {cluster.listen}, which other machines reach: give cluster.secret_file or"
            " cluster.tls, listen on 127.0.0.1, or set cluster.insecure_open = true if anybody may join",
        )
    if config.coordinates and not (api.listen.loopback or api.keys_file or api.insecure_open):
        yield (
            (("api", "listen"), ("api", "keys_file"), ("api", "insecure_open")),
            f"api.listen is {api.listen}, which other machines reach: give api.keys_file, listen on 127.0.0.1, or set"
            " api.insecure_open = true if anybody may use it",
        )


def _private_file(key: KeyPath, path: Path | None, least_bytes: int, env: Mapping[str, str]) -> Iterator[Finding]:
    if path is None:
        return
    name = ".".join(key)
    try:
        status = path.stat()
    except OSError as error:
        yield (key,), f"{name}: {path}: {error.strerror}"
        return
    if not stat.S_ISREG(status.st_mode):
        yield (key,), f"{name}: {path} is not a file"
        return
    if status.st_size < least_bytes:
        yield (key,), f"{name}: {path} holds {status.st_size} bytes; it takes at least {least_bytes}"
    if status.st_mode & 0o077 and not passed_in(path, env):
        mode = stat.S_IMODE(status.st_mode)
        yield (key,), f"{name}: {path} can be read by others (mode {mode:04o}); run chmod 600 {path}"


def _tls(
    section: KeyPath, public: Mapping[str, Path | None], private: Path | None, env: Mapping[str, str]
) -> Iterator[Finding]:
    files = {**public, "key": private}
    missing = [name for name, path in files.items() if path is None]
    name = ".".join(section)
    if missing and len(missing) < len(files):
        keys = tuple((*section, key) for key, path in files.items() if path is not None)
        yield keys, f"{name}: {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing; give all, or none"
        return
    for key, path in public.items():
        if path is not None and not path.is_file():
            yield ((*section, key),), f"{name}.{key}: {path} is not a file"
    yield from _private_file((*section, "key"), private, 1, env)


def passed_in(path: Path, env: Mapping[str, str]) -> bool:
    """Whether systemd passed the file in: it guards credentials by their directory, and the file's own mode can show an
    access list as rights of the group."""
    directory = env.get("CREDENTIALS_DIRECTORY")
    return bool(directory) and path.is_relative_to(str(directory))


def _limits(config: Config) -> Iterator[Finding]:
    timers, engine, cluster = config.cluster.timers, config.engine, config.cluster
    if timers.dead_after_s < 2 * timers.ping_s:
        yield (
            (("cluster", "timers", "dead_after"), ("cluster", "timers", "ping")),
            "cluster.timers.dead_after must be at least twice cluster.timers.ping, or one late ping loses a peer",
        )
    if cluster.window_bytes < cluster.chunk_bytes:
        yield (("cluster", "window"), ("cluster", "chunk")), "cluster.window must hold at least one cluster.chunk"
    for name in ("prefill_chunk_tokens", "max_batch_sequences"):
        if getattr(engine, name) > engine.max_batch_tokens:
            keys = (("engine", name), ("engine", "max_batch_tokens"))
            yield keys, f"engine.{name} must not be more than engine.max_batch_tokens"


def _pin(path: KeyPath, pin: PinConfig) -> Iterator[Finding]:
    name = f'planner.pins."{path[-1]}"'
    low, high = pin.min_layers, pin.max_layers
    keys = tuple((*path, key) for key in ("min_layers", "max_layers", "range", "exclude"))
    if low is not None and high is not None and low > high:
        yield keys, f"{name}: min_layers is more than max_layers"
    if pin.range is not None and not (low or 0) <= len(pin.range) <= (high or len(pin.range)):
        yield keys[::-1], f"{name}: range {pin.range} has {len(pin.range)} layers, against min_layers or max_layers"
    if pin.exclude and (low is not None or pin.range is not None):
        yield keys[::-1], f"{name}: exclude contradicts min_layers and range"
