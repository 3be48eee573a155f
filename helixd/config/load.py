"""From flags, environment, file and defaults to one checked `Config`. Collects every problem before it raises."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from helixd.config.checks import check
from helixd.config.derive import derive
from helixd.config.problems import ConfigErrors, Problem
from helixd.config.schema import KeyPath, Schema, own_keys
from helixd.config.sections import Config
from helixd.config.sources import Override, Setting, find_file, from_environment, from_file, from_overrides

SCHEMA = Schema(Config)


@dataclass(frozen=True, slots=True)
class Loaded:
    """A checked configuration, where each value that is not a plain default came from, and the file that was read."""

    config: Config
    origins: Mapping[KeyPath, str]
    file: Path | None


def load_config(
    overrides: Sequence[Override] = (), env: Mapping[str, str] | None = None, file: Path | None = None
) -> Config:
    """The configuration to run with. `env` None is an empty environment. Raises ConfigErrors with every problem."""
    return load(overrides, env or {}, file).config


def load(overrides: Sequence[Override], env: Mapping[str, str], file: Path | None) -> Loaded:
    """As `load_config`, with origins. Raises ConfigErrors."""
    problems: list[Problem] = []
    path = find_file(env, file)
    given: list[Setting] = []
    file_is_read = True
    if path is not None:
        try:
            given += from_file(path, SCHEMA, problems)
        except ConfigErrors as error:
            problems += error.problems
            file_is_read = False
    given += from_environment(env, SCHEMA, problems)
    given += from_overrides(overrides, SCHEMA, problems)

    values: dict[KeyPath, object] = {}
    origins: dict[KeyPath, str] = {}
    bad: set[KeyPath] = set()
    for setting in given:
        spec = SCHEMA.find(setting.path)
        assert spec is not None, "the sources yield known keys only"
        origins[setting.path] = setting.origin
        try:
            values[setting.path] = spec.parse(setting.value, setting.base, is_text=setting.is_text)
        except ValueError as error:
            bad.add(setting.path)
            problems.append(Problem(setting.origin, f"{'.'.join(setting.path)}: {error}"))

    config, derived = derive(build(Config, (), values), env)
    # Without the file's keys, what the checks miss would be noise.
    if file_is_read:
        for keys, message in check(config, env):
            if bad.isdisjoint(keys):
                where = next((origins[key] for key in keys if key in origins), "")
                problems.append(Problem(where, message))
    if problems:
        raise ConfigErrors(problems)
    return Loaded(config, {**origins, **derived}, path)


def build(cls: type[Any], path: KeyPath, values: Mapping[KeyPath, object]) -> Any:
    """The section `cls` at `path` with the values given for its keys, and defaults for the rest."""
    arguments: dict[str, object] = {
        spec.attribute: values[spec.path] for spec in own_keys(cls, path) if spec.path in values
    }
    for item in fields(cls):
        inner = (*path, item.name)
        if "section" in item.metadata:
            arguments[item.name] = build(item.metadata["section"], inner, values)
        elif "entries" in item.metadata:
            names = dict.fromkeys(key[len(inner)] for key in values if key[: len(inner)] == inner)
            arguments[item.name] = {name: build(item.metadata["entries"], (*inner, name), values) for name in names}
    return cls(**arguments)
