"""Files of folders that are not trusted, and folders whose files are replaced as a whole."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

MOST_BYTES = 256 << 20  # of a file that is read as a whole; the largest tokenizer.json in use has some 35 MB


def read_bytes(path: Path) -> bytes:
    """What a file holds. Raises ValueError where there is none, or one that is too large."""
    try:
        if not path.is_file():
            raise ValueError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
        if (size := path.stat().st_size) > MOST_BYTES:
            raise ValueError(f"{path}: {size} bytes, expected at most {MOST_BYTES}")
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None


def read_json(path: Path, missing: dict[str, Any] | None = None) -> dict[str, Any]:
    """The object in a JSON file; ``missing`` where there is no file. Raises ValueError."""
    if missing is not None and not os.path.lexists(path):
        return missing
    return as_json(path, read_bytes(path))


def as_json(path: Path, data: bytes) -> dict[str, Any]:
    """The object in what a JSON file holds. Raises ValueError."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:  # also text that is not UTF-8, and numbers that are too long
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds {type(value).__name__}, expected an object with names")
    return value


@contextlib.contextmanager
def replacing(place: Path, ours: Callable[[str], bool]) -> Iterator[Path]:
    """A folder to write to. Its files are moved to ``place`` when all are complete, those with weights first.

    ours : whether a file with this name is of the kind that is written; what is left of such files is then removed
    Where something fails before that, ``place`` stays as it was.
    """
    try:
        place.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=".npattn-", dir=place))
    except OSError as error:
        raise OSError(f"{place}: cannot be written to: {error.strerror or error}") from None
    try:
        yield made
        written = [p.relative_to(made) for p in made.rglob("*") if p.is_file()]
        for path in sorted(written, key=lambda path: (path.suffix != ".safetensors", path)):
            (place / path).parent.mkdir(exist_ok=True)
            os.replace(made / path, place / path)
        for old in place.iterdir():
            if ours(old.name) and Path(old.name) not in written:
                old.unlink()
    finally:
        shutil.rmtree(made, ignore_errors=True)


__all__ = ["MOST_BYTES", "as_json", "read_bytes", "read_json", "replacing"]
