"""Checkpoints of a training: folders that are there whole or not at all, and from which it goes on to the last bit.

    FOLDER/latest           the name of the last complete checkpoint
    FOLDER/step-000123/     training.json         what was trained and how: settings, names, shapes, and the hash of the tensors
                            training.safetensors  parameters that move, and m and v of AdamW, by the names of npattn
                            config.json ...       the model as a folder of Hugging Face, where ``save`` writes one
    FOLDER/log.jsonl        a line of JSON for each step

A checkpoint is written beside its place, reaches the disk, and is then renamed; ``latest`` is replaced last. Whatever ends the
process before that leaves the checkpoint before. The one before the last is kept, too; older ones are removed. Nothing is a
pickle, and a folder is not trusted: hash, names, shapes and dtypes are compared before anything is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from npattn.models.files import as_json, read_bytes, read_json
from npattn.models.trees import named_leaves
from npattn.ops.checks import Array
from npattn.training.optimizers import AdamW

FORMAT = "npattn training 1"
LATEST, LOG, STATE, TENSORS = "latest", "log.jsonl", "training.json", "training.safetensors"
KEPT = 2


def found(folder: Path) -> str | None:
    """The name of the last complete checkpoint, None where there is none. Raises ValueError where ``latest`` holds no name."""
    if not os.path.lexists(folder / LATEST):
        return None
    name = read_bytes(folder / LATEST).decode(errors="replace").strip()
    if not re.fullmatch(r"step-\d{6,}", name):
        raise ValueError(f"{folder / LATEST}: holds {name[:40]!r}, expected the name of a checkpoint, such as step-000123")
    return name


def described(folder: Path) -> dict[str, Any]:
    """What training.json of the last checkpoint holds. Raises ValueError."""
    name = found(folder)
    if name is None:
        raise ValueError(f"{folder}: has no checkpoint to go on from")
    state = read_json(folder / name / STATE)
    if state.get("format") != FORMAT:
        raise ValueError(f"{folder / name / STATE}: the format is {state.get('format')!r}, expected {FORMAT!r}")
    return state


def options_of(folder: Path, given: Mapping[str, Any], defaults: Mapping[str, Any], resume: bool) -> dict[str, Any]:
    """The options of a task: as given, else the defaults; where it goes on from a checkpoint, those that stand there.

    given : None for what was not given   defaults : the names of all options
    Raises ValueError where one was given that differs from the checkpoint's.
    """
    if not resume or found(folder) is None:
        return {name: x if given.get(name) is None else given[name] for name, x in defaults.items()}
    stored = described(folder).get("about", {}).get("options")
    if not isinstance(stored, dict) or sorted(stored) != sorted(defaults):
        raise ValueError(f"{folder}: is of another training, expected one with the options {', '.join(defaults)}")
    for name, x in stored.items():
        if given.get(name) not in (None, x):
            raise ValueError(f"{folder}: the checkpoint has {name} {x!r}, which cannot become {given[name]!r}")
    return stored


def write(folder: Path, optimizer: AdamW, about: Mapping[str, Any], save: Callable[[Path, Any], None] | None) -> str:
    """Writes the checkpoint of the step that was made last, and returns its name. Raises OSError; the one before is left."""
    name = f"step-{optimizer.steps:06}"
    folder.mkdir(parents=True, exist_ok=True)
    _sweep(folder)
    made = Path(tempfile.mkdtemp(prefix=".step-", dir=folder))
    try:
        if save is not None:
            save(made, optimizer.params)
        data = _packed(_tensors(optimizer))
        (made / TENSORS).write_bytes(data)
        state = {"format": FORMAT, "step": optimizer.steps, **about, "frozen": _hash_of_frozen(optimizer),
                 "sha256": hashlib.sha256(data).hexdigest()}  # fmt: skip
        (made / STATE).write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
        for path in [*made.rglob("*"), made]:
            _to_disk(path)
        if (folder / name).exists():  # of a run that ended between the two renames below
            shutil.rmtree(folder / name)
        os.rename(made, folder / name)
        replace_text(folder / LATEST, name + "\n")
    finally:
        shutil.rmtree(made, ignore_errors=True)
    for old in sorted(p for p in folder.glob("step-*") if p.name <= name)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return name


def read(folder: Path, optimizer: AdamW, about: Mapping[str, Any]) -> dict[str, Any]:
    """Brings the optimizer to the last checkpoint, and returns what training.json holds.

    Raises ValueError where the checkpoint is damaged, or is that of another training: what it has, and what was expected.
    """
    state = described(folder)
    place = folder / str(found(folder))
    for key, expected in about.items():
        if key != "machine" and (there := state.get(key)) != json.loads(json.dumps(expected)):
            raise ValueError(f"{place}: is of another training: {_difference(key, there, expected)}")
    if state.get("frozen") != _hash_of_frozen(optimizer):
        raise ValueError(f"{place}: is of another training: the parameters that are frozen differ from those given")
    data = _all_bytes(place / TENSORS)
    if hashlib.sha256(data).hexdigest() != state.get("sha256"):
        raise ValueError(f"{place / TENSORS}: {len(data)} bytes whose hash is not that in {STATE}: damaged, or cut short")
    stored, own = _unpacked(place / TENSORS, data), _tensors(optimizer)
    if wrong := sorted(set(stored) ^ set(own)):
        where = "is not a tensor of this training" if wrong[0] in stored else "is missing"
        raise ValueError(f"{place / TENSORS}: {wrong[0]} {where} ({len(wrong)} such tensors)")
    for name, x in own.items():
        y = stored[name]
        if (y.shape, y.dtype) != (x.shape, x.dtype):
            raise ValueError(f"{place / TENSORS}: {name} is {y.dtype} {y.shape}, expected {x.dtype} {x.shape}")
    for name, x in own.items():
        x[...] = stored[name]
    optimizer.steps = int(state["step"])
    return state


def read_log(folder: Path, steps: int) -> list[dict[str, Any]]:
    """The lines of the log up to this step. What a process wrote after its last checkpoint is left out, and out of the file."""
    path = folder / LOG
    if not path.exists():
        return []
    lines = []
    for line in path.read_bytes().splitlines():
        with contextlib.suppress(ValueError):  # the last line may be half written
            lines.append(as_json(path, line))
    kept = [line for line in lines if line.get("step", steps + 1) <= steps]
    replace_text(path, "".join(json.dumps(line) + "\n" for line in kept))
    return kept


def replace_text(path: Path, text: str) -> None:
    """The file holds this text, or what it held before: never a part."""
    made = path.with_name(f".{path.name}.new")
    made.write_text(text, encoding="utf-8")
    _to_disk(made)
    os.replace(made, path)
    _to_disk(path.parent)


def _tensors(optimizer: AdamW) -> dict[str, Array]:
    """What changes in training, by name."""
    moving = {name: p for name, p in named_leaves(optimizer.params).items() if name in optimizer.m}
    parts = {"params": moving, "m": optimizer.m, "v": optimizer.v}
    return {f"{part}.{name}": x for part, arrays in parts.items() for name, x in arrays.items()}


def _hash_of_frozen(optimizer: AdamW) -> str:
    whole = hashlib.sha256()
    for name, p in named_leaves(optimizer.params).items():
        if name not in optimizer.m:
            whole.update(f"{name} {p.dtype} {p.shape}".encode())
            whole.update(np.ascontiguousarray(p).data)
    return whole.hexdigest()


def _packed(tensors: dict[str, Array]) -> bytes:
    try:
        from safetensors.numpy import save
    except ImportError:
        raise ImportError("safetensors is missing, which writes checkpoints: pip install 'npattn[models]'") from None
    return bytes(save(tensors))


def _unpacked(path: Path, data: bytes) -> dict[str, Array]:
    try:
        from safetensors import SafetensorError
        from safetensors.numpy import load
    except ImportError:
        raise ImportError("safetensors is missing, which reads checkpoints: pip install 'npattn[models]'") from None
    try:
        return dict(load(data))
    except SafetensorError as error:
        raise ValueError(f"{path}: {error}") from None


def _all_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None


def _difference(key: str, there: Any, expected: Any) -> str:
    """The first value that differs, with its name."""
    if isinstance(there, dict) and isinstance(expected, Mapping):
        for name in sorted({*there, *expected}):
            if there.get(name) != json.loads(json.dumps(expected.get(name))):
                return _difference(f"{key}.{name}", there.get(name), expected.get(name))
    return f"it has {key} {there!r}, expected {expected!r}"


def _to_disk(path: Path) -> None:
    """What was written reaches the disk before the next call. Systems that do not open folders are left alone."""
    with contextlib.suppress(PermissionError):
        number = os.open(path, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def _sweep(folder: Path) -> None:
    """Removes what a process that was ended left half written."""
    for path in folder.glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)


__all__ = ["described", "found", "options_of", "read", "read_log", "replace_text", "write"]
