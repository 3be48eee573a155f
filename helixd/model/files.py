"""Reading the small files of a model directory: bounded, inside the directory, never executed.

Decides which paths may be opened (the directory itself, or the Hugging Face cache entry its snapshot links into) and
how large a file may be. Knows nothing about what is in them.
"""

import json
import os
import stat
from pathlib import Path
from typing import cast

from helixd.errors import ModelError

MAX_JSON_BYTES = 100 * 2**20


def resolve_inside(model_dir: Path, name: str) -> Path | None:
    """The real path of `name` in `model_dir`; None if there is no such file.

    Links may lead inside the directory or, for a snapshot in a Hugging Face cache, inside that model's cache entry
    (its `blobs`). Raises ModelError for a name with a path in it, a link that leads elsewhere, or no regular file.
    """
    if not name or name != os.path.basename(name) or name in (".", ".."):
        raise ModelError(f"{name!r} is not a plain file name; files of a model lie directly in its directory")
    root = model_dir.resolve()
    roots = [root, root.parent.parent] if root.parent.name == "snapshots" else [root]
    try:
        path = (root / name).resolve(strict=True)
    except FileNotFoundError:
        return None
    except (OSError, RuntimeError) as error:
        raise ModelError(f"{root / name}: cannot be opened ({error})") from error
    if not any(path.is_relative_to(allowed) for allowed in roots):
        raise ModelError(f"{root / name} links to {path}, outside the model directory; copy the file into it")
    if not stat.S_ISREG(path.stat().st_mode):
        raise ModelError(f"{path} is not a regular file")
    return path


def read_bytes(model_dir: Path, name: str, max_bytes: int = MAX_JSON_BYTES) -> bytes | None:
    """The file's bytes; None if there is no such file. Raises ModelError for one that is too large or unreadable."""
    path = resolve_inside(model_dir, name)
    if path is None:
        return None
    try:
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error})") from error
    if len(data) > max_bytes:
        raise ModelError(f"{path} is larger than {max_bytes} bytes; no model has such a file")
    return data


def parse_json_object(text: str | bytes, where: str) -> dict[str, object]:
    """The JSON object in `text`. Raises ModelError naming `where` for anything else."""
    try:
        data: object = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise ModelError(f"{where} holds {type(data).__name__} where a JSON object belongs")
    return cast(dict[str, object], data)


def read_json_object(model_dir: Path, name: str) -> dict[str, object] | None:
    """The JSON object in a file of the model; None if there is no such file. Raises ModelError."""
    data = read_bytes(model_dir, name)
    return None if data is None else parse_json_object(data, str(model_dir / name))
