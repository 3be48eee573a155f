"""On which line of a TOML text each key stands. tomllib reads every statement, so quoting and escapes are its own."""

import tomllib


def key_lines(text: str) -> dict[tuple[str, ...], int]:
    """The 1-based line on which each key and each table of `text` first appears. `text` must be valid TOML."""
    found: dict[tuple[str, ...], int] = {}
    table: tuple[str, ...] = ()
    statement = ""
    first_line = 1
    for number, line in enumerate(text.split("\n"), start=1):
        if not statement:
            first_line = number
        statement += line + "\n"
        try:
            parsed = tomllib.loads(statement)
        except tomllib.TOMLDecodeError:
            continue  # a value over several lines: it parses once its last line is there
        is_header = statement.lstrip().startswith("[")
        if is_header:
            table = ()
        for path in _paths(parsed):
            found.setdefault((*table, *path), first_line)
        if is_header:
            table = max(_paths(parsed), key=len)
        statement = ""
    return found


def _paths(value: object) -> list[tuple[str, ...]]:
    """Paths of all keys in nested tables, parents first; a list of tables counts as its first."""
    if isinstance(value, list):
        value = value[0] if value else None
    if not isinstance(value, dict):
        return []
    return [path for name, inner in value.items() for path in ((name,), *((name, *rest) for rest in _paths(inner)))]
