"""On which line of a JSON or TOML text each key stands, named as complaints name it: `nodes[3].type`.

The text is known to be valid; nothing here judges it. A key that is not there is answered for by what it would be in.
"""

import json
import re
import tomllib
from bisect import bisect_right
from collections.abc import Iterator

_TOKEN = re.compile(
    r'"(?:[^"\\\n]|\\.)*"'  # a string
    r"|'[^'\n]*'"  # TOML's other string
    r"|#[^\n]*"  # TOML's comment
    r"|[\[\]{},:=]"
    r"|[^\s\[\]{},:=\"'#]+"  # a number, a word, TOML's bare key
)


def line_of(text: str, key: str, *, toml: bool) -> int | None:
    """The 1-based line of `key`, or of the nearest thing around it; None if even that is not found."""
    positions = dict(_toml(text) if toml else _values(text, 0, ""))
    newlines = [at for at, letter in enumerate(text) if letter == "\n"]
    for cut in range(len(key), 0, -1):
        if key[:cut] in positions and (cut == len(key) or key[cut] in ".["):
            return bisect_right(newlines, positions[key[:cut]] - 1) + 1
    return None


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _values(text: str, start: int, path: str) -> Iterator[tuple[str, int]]:
    """Every key below the value that begins at or after `start`, with its offset. JSON, or an inline TOML value."""
    # Per open bracket: its path, and in an object the key of the next value (None: a key comes), in a list its number.
    stack: list[tuple[str, str | int | None]] = []
    for token in _TOKEN.finditer(text, start):
        word = token.group()
        if word[0] == "#" or word in ":=":
            continue
        if word == ",":
            inside, at = stack[-1]
            stack[-1] = (inside, at + 1 if isinstance(at, int) else None)
            continue
        if word in "]}":
            stack.pop()
            if not stack:
                return
            continue
        found = path
        if stack:
            inside, at = stack[-1]
            if at is None:
                name = json.loads(word) if word[0] == '"' else word.strip("'")
                stack[-1] = (inside, name)
                yield _join(inside, name), token.start()
                continue
            found = f"{inside}[{at}]" if isinstance(at, int) else _join(inside, at)
            if isinstance(at, int):
                yield found, token.start()
        if word in "[{":
            stack.append((found, 0 if word == "[" else None))
        elif not stack:
            return


def _toml(text: str) -> Iterator[tuple[str, int]]:
    """Every key of a TOML text with its offset: statement by statement, so that quoting is tomllib's business."""
    table = ""
    counts: dict[str, int] = {}
    statement, start, offset = "", 0, 0
    for line in text.splitlines(keepends=True):
        if not statement:
            start = offset
        statement += line
        offset += len(line)
        try:
            parsed = tomllib.loads(statement)
        except tomllib.TOMLDecodeError:
            continue  # a value over several lines: it parses once its last line is there
        head = statement.lstrip()
        at = start + len(statement) - len(head)
        if head.startswith("["):
            table = _table(parsed, counts, new=head.startswith("[["))
            yield table, at
        elif parsed:
            names: list[str] = []
            value: object = parsed
            while isinstance(value, dict) and len(value) == 1 and not head.split("=", 1)[1].lstrip().startswith("{"):
                name, value = next(iter(value.items()))
                names.append(name)
                yield _join(table, ".".join(names)), at
            if not names:
                names = list(parsed)
                yield _join(table, names[0]), at
            yield from _values(text, at + head.index("=") + 1, _join(table, ".".join(names)))
        statement = ""


def _table(parsed: object, counts: dict[str, int], *, new: bool) -> str:
    """The path of a table's header; a list of tables is at its last element, which `[[...]]` adds."""
    path = ""
    while True:
        if isinstance(parsed, list):
            parsed = parsed[0]
        if not isinstance(parsed, dict) or not parsed:
            return path
        name, parsed = next(iter(parsed.items()))
        path = _join(path, name)
        last = not (parsed[0] if isinstance(parsed, list) else parsed)
        if last and new:
            counts[path] = counts.get(path, -1) + 1
        if path in counts:
            path = f"{path}[{counts[path]}]"
