"""What a running daemon takes from a configuration read anew: which keys changed, and which of them need a restart.

Pure. A key that may not change while the daemon runs keeps its old value; what then is in force is checked as a whole,
since the new values may only have made sense together with the others.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from helixd.config.checks import check
from helixd.config.load import SCHEMA, build
from helixd.config.problems import ConfigErrors, Problem
from helixd.config.schema import KeyPath, own_keys
from helixd.config.sections import Config

RELOADABLE = frozenset(
    {
        ("log", "level"),
        ("log", "format"),
        ("api", "keys_file"),
        ("api", "cors_origins"),
        *(path for path in SCHEMA.keys if path[:2] == ("api", "limits")),
        *(path for path in SCHEMA.keys if path[1:-1] == ("tls",)),
        ("cluster", "timers", "step"),
        ("cluster", "timers", "failover_wait"),
        ("cluster", "timers", "max_migrations"),
        ("cluster", "timers", "drain"),
    }
)


@dataclass(frozen=True, slots=True)
class Reload:
    """`config`: what is in force from now on. `applied`, `waiting`: the changed keys that are, and those that wait."""

    config: Config
    applied: tuple[str, ...]
    waiting: tuple[str, ...]


def reloaded(old: Config, new: Config, env: Mapping[str, str]) -> Reload:
    """What `new` changes in a daemon that runs with `old`.

    Raises ConfigErrors where what can change contradicts what cannot without a restart.
    """
    before, after = dict(_values(old)), dict(_values(new))
    changed = [path for path in {**before, **after} if before.get(path) != after.get(path)]
    # A listening socket takes other certificates, but neither begins nor ends to speak TLS.
    fixed = {("api", "tls")} if old.api.tls.on != new.api.tls.on else set()
    fixed |= {("cluster", "tls")} if old.cluster.tls.on != new.cluster.tls.on else set()
    applied = [path for path in changed if path in RELOADABLE and path[:-1] not in fixed]
    config: Config = build(Config, (), before | {path: after[path] for path in applied})
    waiting = [path for path in changed if path not in applied]
    problems = [Problem("", message) for _, message in check(config, env)]
    if problems and waiting:
        keys = ", ".join(map(_dotted, waiting))
        problems.append(Problem("", f"the file as a whole is sound, but {keys} cannot change without a restart"))
    if problems:
        raise ConfigErrors(problems)
    return Reload(config, tuple(map(_dotted, applied)), tuple(map(_dotted, waiting)))


def _values(config: Config) -> Iterator[tuple[KeyPath, object]]:
    for path, spec in SCHEMA.keys.items():
        yield path, getattr(_section(config, path[:-1]), spec.attribute)
    for path, cls in SCHEMA.tables.items():
        table = _section(config, path)
        assert isinstance(table, Mapping)
        for name, entry in table.items():
            for spec in own_keys(cls, (*path, name)):
                yield spec.path, getattr(entry, spec.attribute)


def _section(config: Config, path: KeyPath) -> object:
    value: object = config
    for name in path:
        value = getattr(value, name)
    return value


def _dotted(path: KeyPath) -> str:
    return ".".join(path)
