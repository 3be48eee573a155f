"""The configuration as TOML text: the documented defaults (the shipped helixd.toml), and effective values with origins.

No key holds a secret: secrets live in files of their own, and only the files' names are shown.
"""

import textwrap
from collections.abc import Iterator
from typing import Any

from helixd.config.kinds import to_toml
from helixd.config.load import Loaded
from helixd.config.schema import KeyPath, KeySpec, own_keys, section_doc, sections, tables
from helixd.config.sections import Config

WIDTH = 100

INTRODUCTION = """\
helixd.toml: every setting with its default. A line that begins with "#name =" is a default; remove the # to change it.

helixd reads the first of these that exists: --config FILE, $HELIXD_CONFIG, $XDG_CONFIG_HOME/helixd/helixd.toml \
(~/.config where that is unset; not for root), /etc/helixd/helixd.toml. Flags beat environment variables, which beat \
this file. A key's variable is HELIXD_ and its path with double underscores: HELIXD_API__LISTEN is listen in [api]. \
Relative paths start from this file's directory.

"helixd --check-config" lists every mistake, "helixd --print-config" shows what is in force and why.

Durations are "500ms", "30s", "10m", "2h" or a number of seconds; sizes are "256KiB", "4MiB", "1.5GiB" or a number of \
bytes.\
"""


def documented_defaults() -> str:
    """The text of helixd.toml: every key, commented out at its default, with its meaning."""
    return "\n".join(_document()).rstrip() + "\n"


def effective(loaded: Loaded) -> str:
    """Every key's value in force as TOML, each with a comment that says where it comes from."""
    lines = [f"# read from {loaded.file}" if loaded.file else "# no configuration file was found"]
    for path, cls in sections(Config):
        if path:
            lines += ["", f"[{'.'.join(path)}]"]
        value: Any = loaded.config
        for name in path:
            value = getattr(value, name)
        lines += _values(loaded, cls, path, value)
    for path, cls, _ in tables(Config):
        value = loaded.config
        for name in path:
            value = getattr(value, name)
        for name, entry in value.items():
            lines += ["", f"[{'.'.join(path)}.{to_toml(name)}]", *_values(loaded, cls, (*path, name), entry)]
    return "\n".join(lines) + "\n"


def example(spec: KeySpec) -> str:
    """`name = value` with the default, or with an example for a key that has none."""
    rendered = spec.kind.render(spec.default)
    if rendered is None:
        rendered = [0, 12] if spec.path[-1] == "range" else 12
    return f"{spec.path[-1]} = {to_toml(rendered)}"


def _values(loaded: Loaded, cls: type[Any], path: KeyPath, value: object) -> Iterator[str]:
    for spec in own_keys(cls, path):
        rendered = spec.kind.render(getattr(value, spec.attribute))
        if rendered is not None:
            yield f"{spec.path[-1]} = {to_toml(rendered)}  # {loaded.origins.get(spec.path, 'default')}"


def _document() -> Iterator[str]:
    for number, paragraph in enumerate(INTRODUCTION.split("\n\n")):
        yield from ("#", *_comment(paragraph)) if number else _comment(paragraph)
    yield ""
    for path, cls in sections(Config):
        if path:
            yield from (*_comment(section_doc(cls)), f"[{'.'.join(path)}]", "")
        for spec in own_keys(cls, path):
            yield from (*_comment(f"{spec.doc} ({spec.kind.label})"), f"#{example(spec)}", "")
    for path, cls, doc in tables(Config):
        yield from (*_comment(f"{doc} One such section per node."), f'#[{".".join(path)}."node-id"]', "")
        for spec in own_keys(cls, (*path, "node-id")):
            yield from (*_comment(f"{spec.doc} ({spec.kind.label})"), f"#{example(spec)}", "")


def _comment(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False)
