"""Writing a small file whole or not at all: what is read later is the old content or the new, never half of either.

And how a model's directory is called, which its checkpoint and the configuration must both know.
"""

import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Replace `path` by `text`, on the disk before it returns. Blocking. Raises OSError, and then leaves no partial."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def served_name(model_dir: Path) -> str:
    """The directory's name; `org/name` for a snapshot in a Hugging Face cache (`models--org--name/snapshots/...`)."""
    path = model_dir.resolve()
    cache_entry = path.parent.parent.name
    if path.parent.name == "snapshots" and cache_entry.startswith("models--"):
        return cache_entry.removeprefix("models--").replace("--", "/")
    return path.name or "model"
