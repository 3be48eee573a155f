"""How settings are declared and found: `key` and friends declare them, a `Schema` lists what a dataclass declares.

A setting is declared once, as a dataclass field. Its name in TOML is the field's name without the unit suffix; its
path is the names of the sections around it and its own. Everything else (parsing, environment names, the documented
helixd.toml, --print-config) is derived from that declaration.
"""

import dataclasses
import difflib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

from helixd.config.kinds import Kind

T = TypeVar("T")
KeyPath = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class KeySpec:
    """One declared setting."""

    path: KeyPath
    attribute: str
    kind: Kind[Any]
    default: object
    doc: str

    @property
    def env_name(self) -> str:
        """The environment variable that sets it."""
        return "HELIXD_" + "__".join(self.path).upper()

    def parse(self, value: object, base: Path, *, is_text: bool) -> object:
        """The setting's typed value. Raises ValueError with advice."""
        return self.kind.parse_text(cast(str, value), base) if is_text else self.kind.parse(value, base)


def key(default: T, kind: Kind[Any], doc: str) -> T:
    """Declare a setting as the default of a dataclass field."""
    return field(default=default, metadata={"kind": kind, "doc": doc})


def section(cls: Callable[[], T]) -> T:
    """Declare a nested section. Its class docstring documents it."""
    return field(default_factory=cls, metadata={"section": cls})


def entries(cls: type[T], doc: str) -> Mapping[str, T]:
    """Declare a table of sections whose names the user chooses."""
    return cast(Mapping[str, T], field(default_factory=dict, metadata={"entries": cls, "doc": doc}))


def own_keys(cls: type[Any], path: KeyPath = ()) -> Iterator[KeySpec]:
    """The settings a section's dataclass declares itself, in order."""
    for item in dataclasses.fields(cls):
        if "kind" in item.metadata:
            kind = item.metadata["kind"]
            name = item.name.removesuffix(kind.unit_suffix) if kind.unit_suffix else item.name
            yield KeySpec((*path, name), item.name, kind, item.default, item.metadata["doc"])


def sections(cls: type[Any], path: KeyPath = ()) -> Iterator[tuple[KeyPath, type[Any]]]:
    """`cls` and every section below it with its path, parents first."""
    yield path, cls
    for item in dataclasses.fields(cls):
        if "section" in item.metadata:
            yield from sections(item.metadata["section"], (*path, item.name))


def tables(cls: type[Any], path: KeyPath = ()) -> Iterator[tuple[KeyPath, type[Any], str]]:
    """Every table of user-named sections at or below `cls`: path, the sections' dataclass, its doc."""
    for section_path, section_cls in sections(cls, path):
        for item in dataclasses.fields(section_cls):
            if "entries" in item.metadata:
                yield (*section_path, item.name), item.metadata["entries"], item.metadata["doc"]


def section_doc(cls: type[Any]) -> str:
    """What the section is about, for people."""
    return " ".join((inspect.getdoc(cls) or "").split())


class Schema:
    """Every setting below a root dataclass, by path."""

    def __init__(self, root: type[Any]) -> None:
        self.root = root
        self.sections = dict(sections(root))
        self.keys = {spec.path: spec for path, cls in sections(root) for spec in own_keys(cls, path)}
        self.tables = {path: cls for path, cls, _ in tables(root)}

    def find(self, path: KeyPath) -> KeySpec | None:
        """The setting at `path`, in a user-named section too; None if there is none."""
        if path[:-2] in self.tables:
            return next((spec for spec in own_keys(self.tables[path[:-2]], path[:-1]) if spec.path == path), None)
        return self.keys.get(path)

    def is_table(self, path: KeyPath) -> bool:
        """Whether a TOML table may stand at `path`."""
        return path in self.sections or path in self.tables or path[:-1] in self.tables

    def unknown(self, path: KeyPath) -> str:
        """A message for a path that means nothing, with the nearest one that does."""
        known = {
            ".".join(spec_path): spec_path for spec_path in (*self.keys, *self.sections, *self.tables) if spec_path
        }
        for table_path, cls in self.tables.items():
            if path[:-2] == table_path:
                known = {".".join(spec.path): spec.path for spec in own_keys(cls, path[:-1])}
        name = ".".join(path)
        misplaced = [text for text, known_path in known.items() if known_path[-1] == path[-1]]
        near = difflib.get_close_matches(name, misplaced, n=3, cutoff=0) or difflib.get_close_matches(
            name, known, n=1, cutoff=0.75
        )
        if not near:
            leaves = {known_path[-1]: text for text, known_path in known.items()}
            near = [leaves[leaf] for leaf in difflib.get_close_matches(path[-1], leaves, n=1, cutoff=0.75)]
        hint = f"; did you mean {' or '.join(near)}?" if near else "; helixd.toml documents every key"
        return f"unknown key {name}{hint}"
