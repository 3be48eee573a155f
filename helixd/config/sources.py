"""Where settings come from: the file, the environment, flags. Finds them and their places; judges no value."""

import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from helixd.config.lines import key_lines
from helixd.config.problems import ConfigErrors, Problem
from helixd.config.schema import KeyPath, Schema

SYSTEM_FILE = Path("/etc/helixd/helixd.toml")


@dataclass(frozen=True, slots=True)
class Setting:
    """A value given for a key: where it came from, where its relative paths start, whether it is text to be read."""

    path: KeyPath
    value: object
    origin: str
    base: Path
    is_text: bool


@dataclass(frozen=True, slots=True)
class Override:
    """A flag's value: `key` is a dotted key (quotes allowed), `value` text, `origin` the flag as the user knows it."""

    key: str
    value: str
    origin: str


def find_file(
    env: Mapping[str, str], explicit: Path | None, *, is_root: bool | None = None, system: Path = SYSTEM_FILE
) -> Path | None:
    """The configuration file to read: `--config`, $HELIXD_CONFIG, the user's (not for root), the system's, or none.

    The first two are returned whether or not they exist. The working directory is never searched.
    """
    if explicit is not None:
        return explicit
    if env.get("HELIXD_CONFIG"):
        return Path(env["HELIXD_CONFIG"])
    candidates = [system]
    if not (os.geteuid() == 0 if is_root is None else is_root):
        candidates.insert(0, xdg_directory(env, "XDG_CONFIG_HOME", ".config") / "helixd.toml")
    return next((path for path in candidates if path.is_file()), None)


def xdg_directory(env: Mapping[str, str], variable: str, fallback: str) -> Path:
    """helixd's directory below an XDG base directory. A relative base is ignored, as the specification asks."""
    base = Path(env.get(variable, ""))
    if not base.is_absolute():
        base = Path(env.get("HOME") or os.path.expanduser("~")) / fallback
    return base / "helixd"


def from_file(path: Path, schema: Schema, problems: list[Problem]) -> Iterator[Setting]:
    """The settings of a TOML file. Raises ConfigErrors for a file that cannot be read or parsed."""
    try:
        text = path.read_bytes().decode("utf-8")
        document = tomllib.loads(text)
    except OSError as error:
        raise ConfigErrors([Problem(str(path), f"cannot be read: {error.strerror}")]) from error
    except UnicodeDecodeError as error:
        raise ConfigErrors([Problem(str(path), f"is not UTF-8 (byte {error.start})")]) from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigErrors([_syntax_problem(path, text, str(error))]) from error
    except (ValueError, RecursionError) as error:
        # An integer of thousands of digits, brackets thousands deep: the parser does not call these syntax errors.
        raise ConfigErrors([Problem(str(path), f"is not TOML that can be read: {error}")]) from error
    lines = key_lines(text)
    for key_path, value in _flatten(document, (), schema):
        origin = f"{path}:{lines.get(key_path, 1)}"
        if schema.is_table(key_path) and not isinstance(value, dict):
            problems.append(
                Problem(origin, f"{'.'.join(key_path)} is a section, not a key; write [{'.'.join(key_path)}]")
            )
        elif schema.find(key_path) is None:
            problems.append(Problem(origin, schema.unknown(key_path)))
        else:
            yield Setting(key_path, value, origin, path.absolute().parent, is_text=False)


def from_environment(env: Mapping[str, str], schema: Schema, problems: list[Problem]) -> Iterator[Setting]:
    """The settings of `HELIXD_SECTION__KEY` variables.

    Names without a double underscore belong to others (a Kubernetes service called helixd sets HELIXD_PORT), but for
    those of keys outside sections.
    """
    by_name = {spec.env_name: spec for spec in schema.keys.values()}
    for name, value in env.items():
        if name in by_name:
            yield Setting(by_name[name].path, value, f"${name}", Path.cwd(), is_text=True)
        elif name.startswith("HELIXD_") and "__" in name:
            path = tuple(name.removeprefix("HELIXD_").lower().split("__"))
            table = next((table for table in schema.tables if path[: len(table)] == table), None)
            problems.append(Problem(f"${name}", schema.unknown(path) if table is None else _only_elsewhere(table)))


def from_overrides(overrides: Sequence[Override], schema: Schema, problems: list[Problem]) -> Iterator[Setting]:
    """The settings given as flags."""
    for override in overrides:
        path = split_key(override.key)
        if path is None or (schema.find(path) is None and not schema.is_table(path)):
            problems.append(Problem(override.origin, schema.unknown(path or (override.key,))))
        elif schema.find(path) is None:
            problems.append(Problem(override.origin, f"{override.key} is a section; name a key in it"))
        else:
            yield Setting(path, override.value, override.origin, Path.cwd(), is_text=True)


def split_key(key: str) -> KeyPath | None:
    """A dotted TOML key as its parts, quoted ones too (`planner.pins."a.b".exclude`); None if it is no key."""
    try:
        value: object = tomllib.loads(f"{key} = 0")
    except tomllib.TOMLDecodeError:
        return None
    path: list[str] = []
    while isinstance(value, dict):
        if len(value) != 1:
            return None
        name, value = next(iter(value.items()))
        path.append(name)
    return tuple(path)


def _flatten(table: dict[str, object], path: KeyPath, schema: Schema) -> Iterator[tuple[KeyPath, object]]:
    for name, value in table.items():
        inner = (*path, name)
        if isinstance(value, dict) and schema.is_table(inner):
            yield from _flatten(value, inner, schema)
        else:
            yield inner, value


def _only_elsewhere(table: KeyPath) -> str:
    name = ".".join(table)
    return (
        f"{name} cannot be set by a variable, which cannot have a node's name; use the file, or "
        f"--set '{name}.\"node-id\".KEY=VALUE'"
    )


def _syntax_problem(path: Path, text: str, message: str) -> Problem:
    before, _, place = message.rpartition(" (at ")
    line = place.removeprefix("line ").split(",")[0]
    if not line.isdigit():  # "at end of document"
        line = str(len(text.splitlines()) or 1)
    return Problem(f"{path}:{line}", f"not valid TOML: {before or message}")
